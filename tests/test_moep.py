"""MoE-P computes what its plain loop implementation computes, with less; and what its routers, masks and losses promise."""

import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moep_reference import LoopMoEP
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import modeling_moep
from modeling_moep import MoEPConfig, MoEPForCausalLM, MoEPModel, Router, Routing, load_balancing_loss

TINY = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4, "parallel_hidden_size": 16,
        "parallel_attention_heads": 2, "num_experts": 4, "max_position_embeddings": 24}
IDS = torch.randint(0, 64, (3, 12), generator=torch.Generator().manual_seed(0))
PATHS = pytest.mark.parametrize("path", ["loop", "dense", "grouped"])
WINDOWS = pytest.mark.parametrize("window", [None, 3])


def built(path="auto", seed=0, **keys):
    """A tiny model in eval mode whose biases, norms and projections are all far from their initial values."""
    torch.manual_seed(seed)
    model = MoEPForCausalLM(MoEPConfig(**{**TINY, "expert_path": path, **keys})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def routers_of(model):
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def starve(model, *experts):
    """Make every router pass over `experts`: coordinate 0 of every token is large, and speaks against them."""
    model.model.wte.weight[:, 0] += 5
    model.model.shrink.experts.bias[:, 0] += 5
    for router in routers_of(model):
        router.weight[:, 0] = 0
        router.weight[list(experts), 0] = -10
    return model


def objective(logits, routers, k, ids):
    """Touches every logit, and every router twice."""
    targets = ids.flip(0).flatten()
    return F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") + load_balancing_loss(routers, k).sum()


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(one, other, tolerance=1e-5, message=""):
    assert one.shape == other.shape, message
    difference, scale = float((one - other).detach().abs().max()), max(1.0, float(other.detach().abs().max()))
    assert difference <= tolerance * scale, f"{message or 'values'} differ by {difference:.2g}, the largest is {scale:.2g}"


@pytest.fixture
def poisoned():
    """Memory that nobody wrote to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- Size -----------------------------------------------------------------------------------------------------------

# Parameters of a block of width d with a feed-forward of 4 d are 12 d^2 + 13 d; wide blocks, parallel layers, shrink, grow:
#   6,488,064 + 2 x 1,774,464 + 10 x (4 x 444,864 + 4 x 192)   + 297,216 + 297,216     + 768   = 28,434,432
#  38,990,592 + 2 x 7,087,872 + 10 x (4 x 1,774,464 + 4 x 384) + 1,184,256 + 1,184,256 + 1,536 = 126,530,304


@pytest.mark.parametrize("keys, expected", [
    ({}, 28_434_432),
    ({"vocab_size": 50_257, "hidden_size": 768, "num_attention_heads": 12, "parallel_hidden_size": 384, "parallel_attention_heads": 6},
     126_530_304),
])
def test_the_published_sizes_with_the_tied_head_counted_once(keys, expected):
    with torch.device("meta"):
        model = MoEPForCausalLM(MoEPConfig(**keys))
    assert model.lm_head.weight is model.model.wte.weight
    assert sum(parameter.numel() for parameter in model.parameters()) == expected


# ---- Equality with the reference ------------------------------------------------------------------------------------


def assert_equals_reference(model, ids=IDS):
    plain, k = LoopMoEP(model), model.config.num_experts_per_tok
    expected, routers = plain(ids)
    output = model(input_ids=ids, output_router_logits=True)
    assert_same(output.logits, expected)
    for ours, theirs in zip(output.router_logits, routers, strict=True):
        assert_same(ours, theirs)
    wanted = gradients(plain, objective(expected, routers, k, ids))
    found = gradients(model.model, objective(output.logits, output.router_logits, k, ids))
    assert None not in found.values()
    found = LoopMoEP.renamed(found)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same(found[name], torch.zeros_like(found[name]) if gradient is None else gradient, message=name)


@PATHS
@WINDOWS
@pytest.mark.parametrize("act", ["gelu_new", "swiglu"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_logits_and_all_gradients_equal_the_plain_loop(poisoned, path, window, act, k):
    assert_equals_reference(built(path, num_experts_per_tok=k, hidden_act=act, sliding_window=window))


@PATHS
@pytest.mark.parametrize("starved", [[3], [0], [1, 2]])
def test_an_expert_without_tokens_gets_zeros_as_gradient_and_the_others_what_the_loop_gives(poisoned, path, starved):
    model = starve(built(path), *starved)
    assert_equals_reference(model)
    found = LoopMoEP.renamed({name: parameter.grad for name, parameter in model.model.named_parameters()})
    starving = [any(f"experts.{expert}." in name for expert in starved) for name in found]
    assert sum(starving) == len(starved) * (12 * 2 + 2 * 2)
    assert not any(gradient.any() for gradient, without in zip(found.values(), starving, strict=True) if without)


@PATHS
def test_one_token_and_one_expert_equal_the_plain_loop(poisoned, path):
    assert_equals_reference(built(path), IDS[:1, :1])
    assert_equals_reference(built(path, num_experts=1, num_experts_per_tok=1))
    assert_equals_reference(built(path, num_experts=7, num_experts_per_tok=3))
    assert_equals_reference(built(path, num_hidden_layers=2))


def clear_choices(model, count=1000):
    """Of `count` random sequences the 3 whose narrowest decision between two experts is the widest: no rounding turns one."""
    ids = torch.randint(0, 64, (count, 6), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = torch.stack(model(input_ids=ids, output_router_logits=True).router_logits).sort(dim=-1, descending=True).values
    return ids[(logits[..., 1] - logits[..., 2]).amin(dim=(0, 2)).topk(3).indices]


def test_under_bf16_autocast_the_paths_choose_the_same_experts_and_agree():
    """Bit for bit in the first router, which reads what all compute alike."""
    ids, outputs = clear_choices(built()), {}
    for path in ("loop", "dense", "grouped"):
        model = built(path).train()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=ids, labels=ids, output_router_logits=True)
        outputs[path] = output, gradients(model, output.loss)
        assert all(logits.dtype == torch.float32 for logits in output.router_logits)
    exact = model(input_ids=ids, output_router_logits=True)
    (loop, wanted), *others = outputs.values()
    assert 1e-4 < (loop.logits - exact.logits).norm() / exact.logits.norm() < 0.03
    for ours, theirs in zip(loop.router_logits, exact.router_logits, strict=True):
        assert torch.equal(ours.topk(2).indices, theirs.topk(2).indices)
    for output, found in others:
        assert torch.equal(output.router_logits[0], loop.router_logits[0])
        for ours, theirs in zip(output.router_logits, loop.router_logits, strict=True):
            assert torch.equal(ours.topk(2).indices, theirs.topk(2).indices)
        assert_same(output.logits, loop.logits, 0.03)
        assert abs(output.loss - loop.loss) < 1e-2
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, name


def test_routers_compute_in_fp32_under_autocast():
    tokens, router = torch.randn(20, 32), built().model.shrink.router
    with torch.autocast("cpu", torch.bfloat16):
        _, logits = router(tokens)
    assert logits.dtype == torch.float32 and torch.equal(logits, tokens @ router.weight.T)


# ---- Causality ------------------------------------------------------------------------------------------------------


@PATHS
@WINDOWS
@torch.no_grad()
def test_later_tokens_never_change_an_earlier_logit(path, window):
    model = built(path, sliding_window=window)

    @settings(max_examples=25, deadline=None, database=None, derandomize=True)
    @given(ids=st.lists(st.integers(0, 63), min_size=2, max_size=14), data=st.data())
    def check(ids, data):
        cut = data.draw(st.integers(1, len(ids) - 1))
        later = data.draw(st.lists(st.integers(0, 63), min_size=len(ids) - cut, max_size=len(ids) - cut))
        one, other = (model(input_ids=torch.tensor([ids[:cut] + rest])).logits[0, :cut] for rest in (ids[cut:], later))
        assert_same(one, other)

    check()


@PATHS
@WINDOWS
def test_a_logit_has_a_gradient_in_every_token_up_to_its_own_and_exactly_none_in_later_ones(path, window):
    model = built(path, sliding_window=window)
    embeds = model.model.wte(IDS[:1]).detach().requires_grad_()
    logits = model(inputs_embeds=embeds).logits[0]
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for position in range(12):
        (gradient,) = torch.autograd.grad(logits[position] @ direction, embeds, retain_graph=True)
        assert gradient[0, :position + 1].any(dim=-1).all() and not gradient[0, position + 1:].any()


@PATHS
@torch.no_grad()
def test_sequences_of_a_batch_do_not_see_each_other(path):
    model = built(path)
    assert_same(model(input_ids=IDS).logits, torch.cat([model(input_ids=row[None]).logits for row in IDS]))


# ---- Attention ------------------------------------------------------------------------------------------------------


@WINDOWS
@pytest.mark.parametrize("padded", [False, True])
def test_attention_written_out_equals_the_fused_one(window, padded):
    mask = torch.ones_like(IDS)
    mask[1, :4], mask[2, 9:] = 0, 0
    outputs = []
    for attention in ("sdpa", "eager"):
        model = built(sliding_window=window)
        model.config._attn_implementation = attention
        output = model(input_ids=IDS, attention_mask=mask if padded else None, labels=IDS)
        outputs.append((output.logits, gradients(model, output.loss)))
    assert_same(outputs[1][0], outputs[0][0])
    for name, gradient in outputs[0][1].items():
        assert_same(outputs[1][1][name], gradient, message=name)


def test_attention_is_written_out_in_bf16_on_a_cpu_and_fused_in_fp32(monkeypatch):
    used = []
    right = modeling_moep.eager_attention
    monkeypatch.setattr(modeling_moep, "eager_attention", lambda *a, **b: used.append(a[0].dtype) or right(*a, **b))
    model = built()
    model(input_ids=IDS)
    assert not used
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS)
    assert used == [torch.bfloat16] * 4


# ---- Routing --------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("k", [2, 3, 4])
def test_weights_are_the_probabilities_renormalised_over_the_picked(path, k):
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(k))
    routing = Routing(logits, k, path)
    probabilities, experts = logits.softmax(-1).topk(k)
    expected = probabilities / probabilities.sum(-1, keepdim=True)
    assert_same(routing.weights, expected, 1e-6)
    assert_same(routing.weights.sum(-1), torch.ones(50), 1e-6)
    tokens = torch.randn(50, 8)
    assert_same(routing.combine(routing.spread(tokens)), tokens, 1e-6)
    values = torch.randn(50, 4, 8)
    picked = values.gather(1, experts[:, :, None].expand(-1, -1, 8))
    assert_same(routing.combine(routing.select(values)), (expected[:, :, None] * picked).sum(1), 1e-6)


@pytest.mark.parametrize("path", ["loop", "dense"])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_derivatives_of_routed_linear_maps_equal_finite_differences(path, k):
    """In float64, which the grouped product does not take."""
    random = torch.Generator().manual_seed(2)
    shapes = [(5, 3), (5, 4, 3), (5, 4), (4, 2, 3), (4, 2)]
    tokens, values, logits, weight, bias = (torch.randn(shape, generator=random, dtype=torch.float64).requires_grad_() for shape in shapes)

    def mixture(tokens, values, logits, weight, bias):
        routing = Routing(logits, k, path)
        return routing.combine(routing.linear(routing.spread(tokens) * routing.select(values), weight, bias))

    assert torch.autograd.gradcheck(mixture, (tokens, values, logits, weight, bias))


def test_the_balance_loss_is_1_when_uniform_and_experts_over_k_when_collapsed():
    rotating = torch.stack([50.0 * F.one_hot((torch.arange(8) + shift) % 4, 4) for shift in range(2)]).sum(0)[None]
    assert torch.allclose(load_balancing_loss([rotating], 2), torch.ones(1))
    assert torch.allclose(load_balancing_loss([torch.zeros(2, 7, 4)] * 3, 4), torch.ones(2))
    for k in (1, 2):
        collapsed = torch.zeros(2, 8, 4)
        collapsed[..., :k] = 100.0
        assert torch.allclose(load_balancing_loss([collapsed] * 3, k), torch.full((2,), 4 / k))
    assert torch.allclose(load_balancing_loss([rotating, collapsed[:1]], 2), torch.tensor([1.5]))


def test_the_balance_loss_is_of_each_sequence_and_does_not_count_padding():
    """So that neither accumulation nor padding changes it. Each sequence collapses here, on another expert: their batch is even."""
    logits = torch.stack([torch.zeros(6, 4).index_fill(1, torch.tensor([expert]), 9.0) for expert in range(4)])
    logits = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(3))
    together = load_balancing_loss([logits, logits.flip(0)], 1)
    alone = torch.cat([load_balancing_loss([one[None], other[None]], 1) for one, other in zip(logits, logits.flip(0), strict=True)])
    assert together.shape == (4,) and torch.allclose(together, alone) and (together > 3.5).all()
    mask = torch.ones(4, 6).long()
    mask[0, :2] = mask[1, 3:] = 0
    masked = load_balancing_loss([logits], 2, mask)
    expected = [load_balancing_loss([row[keep.bool()][None]], 2) for row, keep in zip(logits, mask, strict=True)]
    assert torch.allclose(masked, torch.cat(expected)) and not torch.allclose(masked, load_balancing_loss([logits], 2))
    assert load_balancing_loss([logits], 2, torch.zeros(4, 6)).tolist() == [0.0] * 4


def test_descending_the_balance_loss_evens_the_load_of_a_skewed_router():
    random = torch.Generator().manual_seed(4)
    tokens = torch.randn(2, 256, 16, generator=random)
    tokens[..., 0] += 4
    weight = torch.randn(4, 16, generator=random) * 0.3
    weight[0, 0] += 1.5
    weight.requires_grad_()
    optimizer, seen = torch.optim.SGD([weight], lr=0.05), []

    def busiest():
        chosen = (tokens @ weight.T).topk(2).indices
        return chosen.flatten().bincount(minlength=4).max() / chosen.numel()

    assert busiest() > 0.45
    for _ in range(300):
        loss = load_balancing_loss([tokens @ weight.T], 2).mean()
        seen.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert seen[0] > 1.5 and seen[-1] < 1.05
    assert all(later < earlier + 1e-2 for earlier, later in zip(seen, seen[10:], strict=False))
    assert busiest() < 0.3


@PATHS
def test_the_balance_loss_is_part_of_the_training_loss_alone(path):
    model, without = built(path, router_aux_loss_coef=0.5), built(path, router_aux_loss_coef=0)
    mask = torch.ones_like(IDS)
    mask[0, :5] = mask[1, 7:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    keys = {"input_ids": IDS, "attention_mask": mask, "labels": labels}
    for training in (False, True):
        output = model.train(training)(**keys, output_router_logits=True)
        plain = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        balance = load_balancing_loss(output.router_logits, 2, mask).mean()
        assert len(output.router_logits) == 4 and balance > 1
        assert torch.equal(output.aux_loss, balance)
        assert_same(output.loss, plain + 0.5 * balance if training else plain, 1e-6)
        assert torch.equal(output.loss, without.train(training)(**keys).loss) is not training
        silent = model(**keys)
        assert silent.aux_loss is None and silent.router_logits is None and torch.equal(silent.loss, output.loss)
        assert model(input_ids=IDS).loss is None
    by_config = built(path, output_router_logits=True)(input_ids=IDS)
    assert by_config.aux_loss is not None and len(by_config.router_logits) == 4


def test_accumulated_batches_have_the_loss_of_the_whole_one_balance_included():
    """As transformers.Trainer accumulates: by the number of scored tokens in all batches together."""
    model = built(router_aux_loss_coef=0.5).train()
    whole = model(input_ids=IDS, labels=IDS).loss
    parts = [model(input_ids=row[None], labels=row[None], num_items_in_batch=torch.tensor(33)).loss for row in IDS]
    assert_same(sum(parts), whole)


@PATHS
def test_the_weight_of_a_lone_expert_is_its_probability_and_teaches_the_router(path):
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    routing = Routing(logits, 1, path)
    expected = logits.softmax(-1).amax(-1, keepdim=True)
    assert_same(routing.weights, expected, 1e-6)
    tokens = torch.randn(50, 8)
    assert_same(routing.combine(routing.spread(tokens)), expected * tokens, 1e-6)
    assert torch.autograd.grad(routing.combine(routing.spread(tokens)).sum(), logits)[0].abs().sum(1).min() > 0


def test_routers_do_not_see_the_scale_of_the_stream():
    model = built("loop").model
    for layer in (model.shrink, model.grow):
        hidden = torch.randn(1, 5, layer.router.weight.shape[1])
        assert_same(layer(100 * hidden)[1], layer(hidden)[1], 1e-4)


@PATHS
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("coefficient", [0.0, 0.01])
def test_every_router_and_every_picked_expert_gets_a_gradient(path, k, coefficient):
    model = built(path, num_experts_per_tok=k, router_aux_loss_coef=coefficient).train()
    output = model(input_ids=IDS, labels=IDS, output_router_logits=True)
    found = LoopMoEP.renamed(gradients(model.model, output.loss))
    layers = ["shrink", *(f"layers.{layer}" for layer in range(2)), "grow"]
    for name, logits in zip(layers, output.router_logits, strict=True):
        picked = set(logits.topk(k).indices.flatten().tolist())
        assert picked == {0, 1, 2, 3} or k < 4
        assert found[f"{name}.router.weight"].any()
        for expert in range(4):
            mine = [gradient for key, gradient in found.items() if key.startswith(f"{name}.experts.{expert}.")]
            assert len(mine) in (2, 12) and all(bool(gradient.any()) is (expert in picked) for gradient in mine)


# ---- Cost -----------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Synchronisations(TorchFunctionMode):
    """What makes the host wait for a device: reading a value, or asking how many there are. Counted once each."""

    NAMES = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "numpy", "cpu", "nonzero", "argwhere",
             "unique", "masked_select", "equal", "allclose", "repeat_interleave"}

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8)
            for part in (args[1] if isinstance(args[1], tuple) else (args[1],)))
        moved = name == "to" and any(str(value) == "cpu" for value in (*args[1:], *kwargs.values())) and args[0].device.type != "cpu"
        if name in self.NAMES or masked or moved or (name == "where" and len(args) + len(kwargs) == 1):
            self.seen[name] += 1
        return function(*args, **kwargs)


def synchronisations(work):
    """The number that torch functions show; if operations below show a read that no function announced, that many."""
    with torch.no_grad(), Synchronisations() as above, Operations() as below:
        work()
    return max(above.seen.total(), below.seen["_local_scalar_dense"] + below.seen["nonzero"])


def test_the_counters_see_what_they_are_to_count():
    x = torch.tensor([1.0, 0.0])
    for work in (x.tolist, x[0].item, lambda: bool(x[0]), lambda: int(x[0]), x.nonzero, lambda: torch.where(x), lambda: x[x > 0],
                 lambda: x.new_zeros(2).masked_select(x > 0), x.numpy, x.cpu, lambda: float(x[0])):
        assert synchronisations(work) == 1
    assert synchronisations(lambda: torch.where(x > 0, x, x).sum() + x[torch.tensor([0, 1])]) == 0


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("length", [12, 129])
def test_the_forward_pass_waits_once_per_router_on_the_loop_path_and_never_on_the_others(padded, window, length):
    """On a CPU, which waits for nobody, short sequences also ask each parallel layer how many queries there are."""
    ids = IDS.repeat(1, 11)[:, :length]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    keys = {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}
    asked = 2 if length == 12 else 0
    for path, expected in (("loop", 4 + asked), ("dense", 0), ("grouped", asked)):
        body = built(path, sliding_window=window, max_position_embeddings=160).model
        assert synchronisations(lambda body=body: body(**keys)) == expected, path
        training = built(path, sliding_window=window, max_position_embeddings=160).train()
        assert synchronisations(lambda model=training: model(**keys, labels=ids)) == expected, path
    plain = LoopMoEP(built(sliding_window=window))
    assert synchronisations(lambda: plain(IDS)) == 2 * 4, "one per linear expert"


@pytest.mark.parametrize("path", ["loop", "grouped"])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("padded", [None, "left", "right"])
def test_fewer_queries_than_tokens_find_the_same(path, window, padded, monkeypatch):
    """One of four experts per token: a block has about a quarter of the queries; with padding, windows and a cache."""
    model = built(path, num_experts_per_tok=1, sliding_window=window, max_position_embeddings=160).train()
    mask = None
    if padded:
        mask = torch.ones_like(IDS)
        mask[0, slice(0, 3) if padded == "left" else slice(9, 12)] = 0
    real = mask.bool() if padded else torch.ones_like(IDS).bool()
    right, moved, found = Routing.move_up, [], []

    def spy(self, batch):
        moved.append(right(self, batch))
        return moved[-1]

    for one in (spy, lambda self, batch: None):
        monkeypatch.setattr(Routing, "move_up", one)
        whole = model(input_ids=IDS, attention_mask=mask, use_cache=False).logits[real]
        begun = model(input_ids=IDS[:, :4], attention_mask=None if mask is None else mask[:, :4], use_cache=True)
        rest = model(input_ids=IDS[:, 4:], attention_mask=mask, past_key_values=begun.past_key_values).logits[real[:, 4:]]
        found.append([whole, rest, *gradients(model, whole.square().mean() + rest.square().mean()).values()])
    assert sum(positions is not None for positions in moved) >= 3, "it was tried"
    for mine, wanted in zip(*found, strict=True):
        assert_same(mine, wanted)


def test_moving_up_leaves_every_row_its_own_place_and_knows_its_position():
    torch.manual_seed(0)
    routing = Routing(torch.randn(40, 5), 2, "grouped")
    rows = torch.randn(80, 3)
    positions = routing.move_up(2)
    batch, seats, experts = positions.shape
    assert (batch, experts) == (2, 5) and seats <= 16
    placed = routing.place(rows)
    assert placed.shape == (2 * seats, 5, 3) and torch.equal(routing.select(placed), rows)
    expected = routing.tokens % 20
    assert torch.equal(positions.flatten()[routing.slots], expected)
    assert (positions.flatten()[routing.slots.new_ones(positions.numel()).bool().index_fill(0, routing.slots, False)] == 19).all()
    for sequence, expert in ((s, e) for s in range(2) for e in range(5)):
        mine = expected[(routing.experts == expert) & (routing.tokens // 20 == sequence)]
        assert torch.equal(positions[sequence, :len(mine), expert], mine), "in order, no gaps"
    crowded = Routing(torch.tensor([[1.0, 0.0]]).repeat(6, 1), 1, "grouped")
    slots = crowded.slots
    assert crowded.move_up(2) is None and crowded.slots is slots, "one expert has them all"


@pytest.mark.parametrize("k, precision", [(1, torch.float32), (2, torch.float32), (2, torch.bfloat16)])
def test_a_step_is_at_most_half_the_operations_of_the_plain_loop(k, precision):
    model = built("grouped", num_hidden_layers=12, num_experts_per_tok=k).train()
    plain = LoopMoEP(model)
    counts = []
    for work in (lambda: model.model(IDS, use_cache=False).last_hidden_state @ model.lm_head.weight.T, lambda: plain(IDS)[0]):
        with Operations() as operations:
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = F.cross_entropy(work().flatten(0, 1), IDS.flatten())
            loss.backward()
        assert operations.seen["mm"] > 0
        counts.append(operations.seen.total())
    assert counts[0] <= counts[1] / 2, counts


# ---- Padding --------------------------------------------------------------------------------------------------------


def padded_batch(side, fill):
    """Rows of IDS cut to 5, 12 and 8 tokens, and padded to 14."""
    ids, mask = torch.full((3, 14), fill), torch.zeros(3, 14, dtype=torch.long)
    for row, length in enumerate((5, 12, 8)):
        place = slice(14 - length, 14) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = IDS[row, :length], 1
    return ids, mask


@PATHS
@WINDOWS
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing_for_real_tokens(path, window, side):
    model = built(path, sliding_window=window, pad_token_id=0)
    ids, mask = padded_batch(side, 0)
    for attention_mask in (mask, mask.bool(), mask.float()):
        logits = model(input_ids=ids, attention_mask=attention_mask).logits
        assert logits.isfinite().all()
        for row, length in enumerate((5, 12, 8)):
            assert_same(logits[row, mask[row].bool()], model(input_ids=IDS[row:row + 1, :length]).logits[0])
    other = model(input_ids=ids.masked_fill(mask == 0, 7), attention_mask=mask).logits
    assert_same(other[mask.bool()], logits[mask.bool()])


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_of_a_padded_batch_are_finite_and_those_of_its_sequences(side):
    model = built(sliding_window=3).train()
    ids, mask = padded_batch(side, 0)
    labels = ids.masked_fill(mask * F.pad(mask, (1, 0))[:, :-1] == 0, -100)
    found = gradients(model, F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1),
                                             labels[:, 1:].flatten(), reduction="sum"))
    found = {name: gradient.clone() for name, gradient in found.items()}
    alone = sum(F.cross_entropy(model(input_ids=row[None, :length]).logits[0, :-1], row[1:length], reduction="sum")
                for row, length in zip(IDS, (5, 12, 8), strict=True))
    for name, gradient in gradients(model, alone).items():
        if name == "model.wte.weight":
            found[name], gradient = found[name][1:], gradient[1:]
        assert_same(found[name], gradient, message=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_row_of_the_attention_is_without_keys(side, monkeypatch):
    """Its softmax is NaN, and so are all gradients, wherever SDPA does not happen to turn it into zeros."""

    def plain(q, k, v, attn_mask, dropout_p, is_causal):
        assert not is_causal and not dropout_p
        return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~attn_mask, -math.inf).softmax(-1) @ v

    model = built(sliding_window=3)
    ids, mask = padded_batch(side, 0)
    expected = model(input_ids=ids, attention_mask=mask).logits
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    output = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert_same(output.logits, expected)
    assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())


@torch.no_grad()
def test_a_real_token_equal_to_the_pad_token_is_not_masked():
    ids = IDS.clone()
    ids[:, [0, 4, 11]] = 9
    expected = built()(input_ids=ids).logits
    for special in ({"pad_token_id": 9}, {"pad_token_id": 9, "eos_token_id": 9}, {"eos_token_id": 9}):
        model = built(**special)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert_same(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, expected)


@torch.no_grad()
def test_a_mask_in_the_middle_hides_its_tokens():
    model, mask = built(), torch.ones(1, 12).long()
    mask[0, 4:6] = 0
    changed = IDS[:1].clone()
    changed[0, 4:6] = 1
    logits = [model(input_ids=ids, attention_mask=mask).logits[0, mask[0].bool()] for ids in (IDS[:1], changed)]
    assert_same(*logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_explicit_positions_equal_the_default_ones(side):
    model = built()
    ids, mask = padded_batch(side, 3)
    positions = torch.arange(12).expand(3, 12)
    assert torch.equal(model(input_ids=IDS).logits, model(input_ids=IDS, position_ids=positions).logits)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(expected, model(input_ids=ids, attention_mask=mask, position_ids=positions).logits)
    assert (expected - model(input_ids=ids, attention_mask=mask, position_ids=positions + 1).logits).abs().max() > 0.1


# ---- Dropout and errors ---------------------------------------------------------------------------------------------


@PATHS
def test_dropout_acts_in_training_only(path):
    model, without = built(path, dropout=0.3, attention_dropout=0.3), built(path)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, without(input_ids=IDS).logits)
    for keys in ({"dropout": 0.3}, {"attention_dropout": 0.3}):
        model = built(path, **keys).train()
        torch.manual_seed(0)
        one, other = model(input_ids=IDS, labels=IDS), model(input_ids=IDS, labels=IDS)
        assert (one.logits - other.logits).abs().max() > 1e-2
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients(model, one.loss).values())
    with torch.no_grad():
        assert torch.equal(without.train()(input_ids=IDS).logits, without(input_ids=IDS).logits)


def test_more_tokens_than_positions_is_an_error_that_names_the_limit():
    model = built()
    assert model(input_ids=torch.ones(1, 24, dtype=torch.long)).logits.shape == (1, 24, 64)
    with pytest.raises(ValueError, match=r"25 tokens exceed the model's 24 positions \(max_position_embeddings\)"):
        model(input_ids=torch.ones(1, 25, dtype=torch.long))
    past = model(input_ids=torch.ones(1, 20, dtype=torch.long)).past_key_values
    with pytest.raises(ValueError, match=r"25 tokens \(20 of them cached\) exceed the model's 24 positions"):
        model(input_ids=torch.ones(1, 5, dtype=torch.long), past_key_values=past)
    with pytest.raises(ValueError, match=r"position_ids reach 24, but the model has positions 0 \.\.\. 23"):
        model(input_ids=torch.ones(1, 2, dtype=torch.long), position_ids=torch.tensor([[23, 24]]))


@pytest.mark.parametrize("keys, words", [
    ({"input_ids": IDS, "attention_mask": torch.ones(3, 11)},
     r"attention_mask must be \[batch, 12\] \(0 cached and 12 new tokens\), not \[3, 11\]"),
    ({"input_ids": IDS, "attention_mask": torch.ones(3, 12, 12)}, r"attention_mask must be .* not \[3, 12, 12\]"),
    ({}, "either input_ids or inputs_embeds"),
    ({"input_ids": IDS, "inputs_embeds": torch.zeros(3, 12, 32)}, "either input_ids or inputs_embeds"),
    ({"input_ids": IDS, "output_attentions": True}, "no attention weights"),
])
@pytest.mark.parametrize("part", [lambda model: model, lambda model: model.model], ids=["whole", "body"])
def test_wrong_inputs_are_errors(keys, words, part):
    with pytest.raises(ValueError, match=words):
        part(built())(**keys)


SIZES = ["vocab_size", "hidden_size", "num_attention_heads", "parallel_hidden_size", "parallel_attention_heads", "num_experts",
         "num_experts_per_tok", "max_position_embeddings"]
WRONG = {
    **dict.fromkeys(SIZES, (-1, 0, 2.0, "3", None, True)),
    **dict.fromkeys(["intermediate_size", "parallel_intermediate_size"], (-1, 0, 2.0, "3")),
    **dict.fromkeys(["dropout", "attention_dropout"], (-0.1, 1.0, 2, "0.1", None, math.nan)),
    **dict.fromkeys(["router_aux_loss_coef", "initializer_range", "layer_norm_epsilon"], (-1, None, "x", math.nan, math.inf)),
    "num_hidden_layers": (1, 0, 2.0, None), "sliding_window": (0, -1, 2.5, "4"),
    "hidden_act": ("relu", None), "expert_path": ("fast", None),
}
MISFITS = [("hidden_size", 34), ("num_attention_heads", 5), ("parallel_hidden_size", 17), ("parallel_attention_heads", 3),
           ("num_experts_per_tok", 5), ("num_experts", 1)]


@pytest.mark.parametrize("name, value", [*((name, value) for name, values in WRONG.items() for value in values), *MISFITS])
def test_a_wrong_value_is_an_error_that_names_its_key(name, value):
    with pytest.raises(ValueError, match=f"MoEPConfig: .*{name}"):
        MoEPConfig(**{**TINY, name: value})


@pytest.mark.parametrize("wrong, words", [
    ({"vocab_size": 0, "hidden_act": "relu", "dropout": None, "expert_path": "x", "num_hidden_layers": 1, "sliding_window": 0}, [""] * 6),
    ({"hidden_size": 10, "num_attention_heads": 3, "parallel_hidden_size": 11, "parallel_attention_heads": 4, "num_experts_per_tok": 5},
     [" 10", " 3", " 11", " 4", " 5"]),
])
def test_several_wrong_values_are_listed_together(wrong, words):
    with pytest.raises(ValueError) as error:
        MoEPConfig(**wrong)
    assert all(name + word in str(error.value) for name, word in zip(wrong, words, strict=True))


def test_a_value_set_later_is_checked_and_heeded_when_the_model_is_built():
    """from_pretrained(..., key=value) sets values of a finished config."""
    config = MoEPConfig(**TINY)
    config.sliding_window = 3
    assert config.layer_types == ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    config.num_experts_per_tok = 9
    with pytest.raises(ValueError, match="num_experts_per_tok 9 exceeds num_experts 4"):
        MoEPModel(config)


@pytest.mark.parametrize("depth, window, expected", [(4, None, "ffff"), (4, 3, "ffsf"), (7, 3, "ffsfsff"), (2, 3, "ff"), (3, 3, "fff")])
def test_every_second_parallel_layer_has_the_window(depth, window, expected):
    assert "".join(kind[0] for kind in MoEPConfig(**{**TINY, "num_hidden_layers": depth, "sliding_window": window}).layer_types) == expected
