"""The Distiller: one nn.Module that holds the student and everything else that is trained, and whose forward returns
the terms of the loss. DDP, accumulation, saving and resuming therefore treat all trained parameters alike.

Every training stage uses it. Without teachers the only term is the cross-entropy: that is a baseline, and it is how
teachers themselves are trained. The logit terms (CE, KL) come from one fused kernel; each further term is a module below
that reads a `View` of the batch and returns [B, T-1] values per column of the log. To add a term, write such a module,
its section in config.py, and a line in `Distiller.__init__`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from babylm import losses, models, parallel
from babylm.config import AuxiliarySection, ContrastiveSection, DistillationSection, HiddenSection, TeacherEntry
from babylm.losses import FusedTerms, Head
from babylm.schema import UserError, fixed
from modeling_moep import MoEPConfig, load_balancing_loss

CROSS_ENTROPY = DistillationSection(w_ce=fixed(1.0), w_kl=fixed(0.0))


def state_key(teacher: int, state: int) -> str:
    """Name under which a batch carries hidden state `state` of teacher number `teacher` when it is read from a cache."""
    return f"teacher{teacher}_state{state}"


# ---- Teachers -------------------------------------------------------------------------------------------------------


class Teacher:
    """A frozen teacher: its output head, and its body unless the hidden states come from a cache.

    No nn.Module: it is neither saved, nor counted, nor given to DDP or the optimizer.

    Args:
        head: reads the last state; on the student's device.
        depth: number of blocks, so that states are numbered 0 (embeddings) ... depth (what the head reads).
        width: of its states.
        model: the whole model, or None where states are cached. Frozen here, and in eval mode for good.
        entry: weight, layer map, device.
    """

    def __init__(self, head: Head, depth: int, width: int, model: nn.Module | None = None, entry: TeacherEntry | None = None):
        self.head, self.depth, self.width, self.model = head, depth, width, model
        self.entry = entry or TeacherEntry(path="teacher")
        self.body = models.body_and_head(model)[0] if model is not None else None

    @classmethod
    def from_model(cls, model: nn.Module, entry: TeacherEntry | None = None) -> "Teacher":
        """A teacher that is run. UserError where its logits are not one linear layer of its last hidden state."""
        model.requires_grad_(False).eval()
        _, linear = models.body_and_head(model)
        if linear is None:
            raise UserError(f"the teacher {entry.path if entry else type(model).__name__} makes its logits by more than one linear layer "
                            "of its last hidden state (scaled, capped or adapted): merge adapters, or take another teacher")
        widths = models.state_widths(model.config)
        if entry and (narrow := [state for state in entry.layers if state < len(widths) and widths[state] != linear.in_features]):
            raise UserError(f"distillation.teachers: state {narrow[0]} of {entry.path} is {widths[narrow[0]]} wide: only states as wide as "
                            f"what its head reads ({linear.in_features}) can be mapped")
        return cls(Head(linear.weight, linear.bias), model.config.num_hidden_layers, linear.in_features, model, entry)

    def states(self, input_ids: torch.Tensor, wanted: Iterable[int]) -> dict[int, torch.Tensor]:
        """{state number: [B, T-1, width]} for the predicted positions, computed where the body lies and brought to the student."""
        wanted, where = sorted(set(wanted)), next(self.body.parameters()).device
        with torch.no_grad():
            output = self.body(input_ids=input_ids.to(where), use_cache=False, output_hidden_states=wanted != [self.depth])
        every = output.hidden_states
        found = {state: (output.last_hidden_state if state == self.depth else every[state]) for state in wanted}
        return {state: values[:, :-1].contiguous().to(input_ids.device) for state, values in found.items()}

    def to(self, device: torch.device, offload: bool = False) -> None:
        """Head to the student's device; body to the one that the config names, or along; with `offload`, block by block when it runs."""
        if self.model is not None:  # first, so that a head that stays with its body is not copied
            home = torch.device(self.entry.device or device)
            if offload and home.type != "cpu":
                parallel.park_blocks(self.model, home)
            else:
                self.model.to(home)
        self.head = Head(*(part.to(device) if part is not None else None for part in self.head))

    def shard(self, mesh: DeviceMesh, device: torch.device) -> None:
        """A whole head on the student's device; the body in parts over the processes, unless the config names its device."""
        if self.model is None or self.entry.device:
            return self.to(device)
        # Copied first: it may be tied to the embeddings, which are cut.
        self.head = Head(*(part.detach().to(device, copy=True) if part is not None else None for part in self.head))
        parallel.shard(self.body, parallel.blocks_of(self.model), mesh, keep_rest=False)

    def flops_per_token(self, seq_len: int) -> float:
        """Of a forward pass; of the head alone where the states are cached."""
        return models.forward_flops_per_token(self.model, seq_len) if self.model is not None else 2.0 * self.head.weight.numel()

    def layer_map(self, student_depth: int) -> dict[int, int]:
        """Teacher state -> student state for the hidden term; by default last -> last."""
        return self.entry.layers or {self.depth: student_depth}

    @staticmethod
    def wanted_states(section: DistillationSection, entry: TeacherEntry, depth: int) -> list[int]:
        """The states of a teacher that any term reads: the last one always, and those that are mapped."""
        mapped = entry.layers if section.hidden and section.hidden.weight.largest > 0 else ()
        if mapped and max(mapped) > depth:
            raise UserError(f"distillation.teachers: the layer map of {entry.path} reads state {max(mapped)}, but the teacher has states "
                            f"0 ... {depth}")
        return sorted({depth, *mapped})


# ---- What a term sees -----------------------------------------------------------------------------------------------


@dataclass
class View:
    """One batch at its predicted positions 0 ... T-2, as every term sees it."""

    targets: torch.Tensor  # [B, T-1] next tokens
    student: dict[int, torch.Tensor]  # state number -> [B, T-1, width]; the last is what the head reads
    teachers: list[dict[int, torch.Tensor]]  # the same, of each teacher
    fused: "FusedLoss"  # CE and KL of any states under any head
    lm_head: Head
    routers: tuple[torch.Tensor, ...] = ()  # [B, T, E] of each router of a mixture-of-experts student

    @property
    def last(self) -> torch.Tensor:
        """The student's last states [B, T-1, D]."""
        return self.student[max(self.student)]

    @property
    def teachers_last(self) -> list[torch.Tensor]:
        """Each teacher's last states [B, T-1, its width]."""
        return [states[max(states)] for states in self.teachers]


@dataclass
class FusedLoss:
    """`losses.fused_linear_distillation` with this batch's teachers and the run's objective filled in."""

    targets: torch.Tensor
    objective: losses.LogitObjective
    teacher_states: list[torch.Tensor] = field(default_factory=list)
    teacher_heads: list[Head] = field(default_factory=list)
    weights: list[float] | None = None
    compiled: bool = False

    def __call__(self, states: torch.Tensor, head: Head, token_weights: torch.Tensor | None = None) -> FusedTerms:
        """Scalar loss, and ce, kl [B, T-1]; `states` [B, T-1, D]."""
        terms = losses.fused_linear_distillation(
            states.flatten(0, 1), head, self.targets.flatten(), self.objective,
            teacher_states=[theirs.flatten(0, 1) for theirs in self.teacher_states], teacher_heads=self.teacher_heads, weights=self.weights,
            token_weights=token_weights.flatten() if token_weights is not None else None, compiled=self.compiled)
        return FusedTerms(terms.loss, terms.ce.view_as(self.targets), terms.kl.view_as(self.targets))


@dataclass
class Outcome:
    """What a term returns: the scalar to add to the loss (before its weight) and [B, T-1] values, detached, per column."""

    loss: torch.Tensor
    columns: dict[str, torch.Tensor]


# ---- Terms on hidden states -----------------------------------------------------------------------------------------


class Term(nn.Module):
    """A term beside CE and KL: its `forward` maps a View to an Outcome. What it trains follows the student into the optimizer."""

    reads_teachers = False  # whether the teachers must be run for it
    fused_passes = 0  # how often it calls the fused loss, which computes the teachers' logits each time

    def student_states(self) -> set[int]:
        """The student's states that it reads, beside the last (0 = embeddings, i = output of block i)."""
        return set()

    def columns(self) -> list[str]:
        """Names of its figures in validation, the same on every process; those of an Outcome are among them."""
        raise NotImplementedError

    def flops_per_token(self, seq_len: int, head: torch.Tensor) -> float:
        """FLOPs of its matrix products per token, forward and backward, apart from those of teachers' heads.

        Args:
            head: the student's, [V, D].
        """
        raise NotImplementedError


class HiddenTerm(Term):
    """Deeply supervised distillation: distance between mapped states, the student's projected up to the teacher's width.

    The mean over the maps of a teacher, then the teachers' weighted mean. With the default map (last -> last) it is
    hidden-state distillation. One trained linear projection per map.
    """

    reads_teachers = True

    def __init__(self, section: HiddenSection, student_widths: list[int], student_depth: int, teachers: list[Teacher], shares: list[float]):
        super().__init__()
        self.kind, self.normalise, self.shares = section.loss, section.normalise, shares
        self.maps: list[list[tuple[int, int]]] = []
        for teacher in teachers:
            pairs = list(teacher.layer_map(student_depth).items())
            for theirs, ours in pairs:
                if theirs > teacher.depth or ours > student_depth:
                    raise UserError(f"distillation.teachers: the layer map of {teacher.entry.path} sends state {theirs} to {ours}, but the "
                                    f"teacher has states 0 ... {teacher.depth} and the student 0 ... {student_depth}")
            self.maps.append(pairs)
        self.projections = nn.ModuleList(nn.ModuleList(nn.Linear(student_widths[ours], teacher.width) for _, ours in pairs)
                                         for teacher, pairs in zip(teachers, self.maps, strict=True))

    def forward(self, view: View) -> Outcome:
        values = 0.0
        for share, pairs, projections, states in zip(self.shares, self.maps, self.projections, view.teachers, strict=True):
            for (theirs, ours), project in zip(pairs, projections, strict=True):
                distance = losses.state_distance(project(view.student[ours]), states[theirs], self.kind, self.normalise)
                values = values + share / len(pairs) * distance
        return Outcome(values.mean(), {"hidden": values.detach()})

    def student_states(self) -> set[int]:
        return {ours for pairs in self.maps for _, ours in pairs}

    def columns(self) -> list[str]:
        return ["hidden"]

    def flops_per_token(self, seq_len: int, head: torch.Tensor) -> float:
        return 6.0 * _weights_of(self.projections)


class ContrastiveTerm(Term):
    """InfoNCE between projected last states (losses.info_nce); with several teachers the weighted mean of theirs."""

    reads_teachers = True

    def __init__(self, section: ContrastiveSection, student_width: int, teachers: list[Teacher], shares: list[float]):
        super().__init__()
        self.temperature, self.shares = section.temperature, shares
        self.student_projection = nn.Linear(student_width, section.dim)
        self.teacher_projections = nn.ModuleList(nn.Linear(teacher.width, section.dim) for teacher in teachers)

    def forward(self, view: View) -> Outcome:
        ours = self.student_projection(view.last)
        values = sum(share * losses.info_nce(ours, project(_like(states, project)), self.temperature)
                     for share, project, states in zip(self.shares, self.teacher_projections, view.teachers_last, strict=True))
        return Outcome(values.mean(), {"contrastive": values.detach()})

    def columns(self) -> list[str]:
        return ["contrastive"]

    def flops_per_token(self, seq_len: int, head: torch.Tensor) -> float:
        similarities = 6.0 * seq_len * self.student_projection.out_features * len(self.teacher_projections)
        # No gradient goes on into a teacher: 4 of the 6.
        return 6.0 * _weights_of(self.student_projection) + 4.0 * _weights_of(self.teacher_projections) + similarities


class AuxiliaryTerm(Term):
    """Classifiers on shallow blocks, each with the student's own objective (CE and KL to the same teachers).

    Linear - GELU - Dropout - Linear to the vocabulary, or to the student's own head with `share_head`. Adaptive weights
    are a classifier's share in the sum of all classifiers' losses, detached, computed for every sequence on its own (so that
    accumulation cannot change them) and on losses that are means over tokens: a block that lags behind gets more.
    """

    def __init__(self, section: AuxiliarySection, student_widths: list[int], student_depth: int, entries: int, teachers: list[Teacher],
                 shares: list[float]):
        super().__init__()
        if max(section.blocks) >= student_depth:
            raise UserError(f"distillation.auxiliary.blocks: of the student's {student_depth} blocks, 1 ... {student_depth - 1} can have a "
                            f"classifier (the last has the output head); given {section.blocks}")
        self.blocks, self.adaptive, self.shares = section.blocks, section.weighting == "adaptive", shares
        self.feature_weight, self.kinds = section.feature_weight, ("ce", "kl") if teachers else ("ce",)
        self.reads_teachers = self.feature_weight > 0
        self.fused_passes = len(section.blocks) * (1 + self.adaptive)
        self.features, self.heads, self.projections = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for block in section.blocks:
            width, name = student_widths[block], str(block)
            inner = student_widths[-1] if section.share_head else width
            self.features[name] = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Dropout(section.dropout))
            if not section.share_head:
                self.heads[name] = nn.Linear(width, entries)
            if self.feature_weight:
                self.projections[name] = nn.ModuleList(nn.Linear(width, teacher.width) for teacher in teachers)

    def forward(self, view: View) -> Outcome:
        columns, losses_of_heads = {}, []
        features = {block: self.features[str(block)](view.student[block]) for block in self.blocks}
        heads = {block: self._head(block, view) for block in self.blocks}
        weights = self._weights(view, features, heads)
        for block in self.blocks:
            terms = view.fused(features[block], heads[block], token_weights=weights[block])
            losses_of_heads.append(terms.loss)
            columns[f"aux{block}_ce"] = terms.ce
            if view.fused.teacher_states:
                columns[f"aux{block}_kl"] = terms.kl
        total = sum(losses_of_heads)
        if self.feature_weight:
            distances = [self._feature_distance(view, block) for block in self.blocks]
            columns["aux_features"] = sum(distances).detach() / len(self.blocks)
            total = total + self.feature_weight * sum(distances).mean() / len(self.blocks)
        return Outcome(total, columns)

    def _head(self, block: int, view: View) -> Head:
        if not self.heads:
            return view.lm_head
        return Head(self.heads[str(block)].weight, self.heads[str(block)].bias)

    @torch.no_grad()
    def _weights(self, view: View, features: dict[int, torch.Tensor], heads: dict[int, Head]) -> dict[int, torch.Tensor]:
        """{block: [B, T-1]} weights that sum to 1 over the blocks."""
        if not self.adaptive:
            return {block: torch.full(view.targets.shape, 1 / len(self.blocks), device=view.targets.device) for block in self.blocks}
        objective = view.fused.objective
        per_sequence = {}
        for block in self.blocks:  # a first pass without gradients: the weights are needed before the gradients are made
            terms = view.fused(features[block], heads[block])
            per_sequence[block] = (objective.w_ce * terms.ce + objective.w_kl * objective.temperature**2 * terms.kl).mean(1, keepdim=True)
        total = sum(per_sequence.values()).clamp(min=torch.finfo(torch.float32).tiny)  # 0 where only features are taught
        return {block: (mean / total).expand(view.targets.shape) for block, mean in per_sequence.items()}

    def _feature_distance(self, view: View, block: int) -> torch.Tensor:
        return sum(share * losses.state_distance(project(view.student[block]), states)
                   for share, project, states in zip(self.shares, self.projections[str(block)], view.teachers_last, strict=True))

    def student_states(self) -> set[int]:
        return set(self.blocks)

    def flops_per_token(self, seq_len: int, head: torch.Tensor) -> float:
        heads = [self.heads[str(block)].weight if self.heads else head for block in self.blocks]
        logits = sum(2.0 * weight.numel() * (2 + weight.requires_grad + self.adaptive) for weight in heads)  # adaptive: made twice
        return logits + 6.0 * (_weights_of(self.features) + _weights_of(self.projections))

    def columns(self) -> list[str]:
        return [f"aux{block}_{kind}" for block in self.blocks for kind in self.kinds] + ["aux_features"] * bool(self.feature_weight)


class BalanceTerm(Term):
    """The load-balancing loss of a mixture-of-experts student's routers, and what validation tells about them."""

    def __init__(self, config: MoEPConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.routers = ["shrink", *(f"layer{number}" for number in range(1, config.num_hidden_layers - 1)), "grow"]
        self.experts = config.num_experts

    def forward(self, view: View) -> Outcome:
        balance = load_balancing_loss(view.routers, self.k)  # one value per sequence
        columns = {"balance": balance.detach()[:, None].expand(view.targets.shape)}
        with torch.no_grad():
            logits = torch.stack(view.routers)[:, :, :-1].float()  # [R, B, T-1, E]
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
            columns["router_entropy"] = entropy.mean(0)
            if not self.training:  # in validation: for every router and expert
                load = torch.zeros_like(logits).scatter(-1, logits.topk(self.k, dim=-1).indices, 1 / self.k)
                columns["router_dropped"] = 1 - load.sum(-1).mean(0)
                columns |= {f"entropy/{router}": values for router, values in zip(self.routers, entropy, strict=True)}
                columns |= {f"load/{router}/{number}": load[index, ..., number] for index, router in enumerate(self.routers)
                            for number in range(self.experts)}
        return Outcome(balance.mean(), columns)

    def flops_per_token(self, seq_len: int, head: torch.Tensor) -> float:
        return 0.0

    def columns(self) -> list[str]:
        """Names of what validation reports: nats, and shares of a token's choices."""
        return ["balance", "router_entropy", "router_dropped", *(f"entropy/{router}" for router in self.routers),
                *(f"load/{router}/{number}" for router in self.routers for number in range(self.experts))]


def _weights_of(module: nn.Module) -> int:
    """Number of weights of the linear layers in a module."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _like(states: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    """Cached states in the type of the layer that reads them (autocast does the rest)."""
    return states.to(layer.weight.dtype)


# ---- The Distiller --------------------------------------------------------------------------------------------------


class Distiller(nn.Module):
    """loss = w_ce CE + w_kl T^2 D(teachers, student) + w_hidden hidden + ..., every term a mean over predicted tokens, in nats.

    Args:
        student: causal language model to train.
        teachers: those of `section.entries`, in order; frozen, and no submodules.
        section: terms, weights, temperature, schedules; default: cross-entropy only.
        compiled: compile the student, the teachers and the loss's elementwise body (torch.compile).

    A term whose weight is 0 throughout is not built; one whose schedule is at 0 is not computed.

    Raises:
        UserError: a layer map or a classifier does not fit the depths of the models.
    """

    def __init__(self, student: nn.Module, teachers: list[Teacher] = (), section: DistillationSection = CROSS_ENTROPY, *,
                 compiled: bool = False):
        super().__init__()
        self.student, self.teachers, self.section, self.compiled = student, list(teachers), section, compiled
        if not self.teachers and section.weights[1].largest > 0:
            raise ValueError("w_kl is positive but there is no teacher")
        self.progress = 0.0  # share of the run's steps that is done, for schedules; set by the trainer
        total = sum(teacher.entry.weight for teacher in self.teachers)
        self.shares = [teacher.entry.weight / total for teacher in self.teachers]
        self._heads: tuple[list[Head], Head | None] | None = None  # see _teacher_heads
        body, linear = models.body_and_head(student)
        self._halves = (body, linear)  # in a tuple: they are part of the student, and must not be registered twice
        config = student.config
        depth = config.num_hidden_layers
        widths = models.state_widths(config)
        self.depth = depth
        self.terms = nn.ModuleDict()
        if section.hidden and section.hidden.weight.largest > 0:
            self.terms["hidden"] = HiddenTerm(section.hidden, widths, depth, self.teachers, self.shares)
        if section.contrastive and section.contrastive.weight.largest > 0:
            self.terms["contrastive"] = ContrastiveTerm(section.contrastive, widths[-1], self.teachers, self.shares)
        if section.auxiliary and section.auxiliary.weight.largest > 0:
            entries = student.get_output_embeddings().weight.shape[0]
            self.terms["auxiliary"] = AuxiliaryTerm(section.auxiliary, widths, depth, entries, self.teachers, self.shares)
        if config.model_type == "moep":  # without a weight too: validation shows what the routers do
            self.terms["balance"] = BalanceTerm(config)
        if self.terms and self._halves[1] is None:
            raise UserError("hidden, auxiliary and contrastive need a student whose logits are one linear layer of its last hidden state")
        if compiled:
            body.compile()
            for teacher in self.teachers:
                if teacher.body is not None:
                    teacher.body.compile()

    def to_device(self, device: torch.device) -> "Distiller":
        """Move the teachers along with the student (no submodules, they do not follow `.to`)."""
        for teacher in self.teachers:
            teacher.to(device, self.section.offload_teacher)
        self._heads = None
        return self.to(device)

    def shard(self, device: torch.device) -> "Distiller":
        """Instead of `to_device`: each process keeps its part of every weight, the teachers' included, on its device.

        `forward` and `token_terms` then gather what they need, so all processes must call them equally often.
        """
        mesh = parallel.process_mesh(device)
        for teacher in self.teachers:
            teacher.shard(mesh, device)
        self._heads = None
        parallel.shard(self, parallel.blocks_of(self.student), mesh, keep_rest=True, entrances=["token_terms"])
        # What the Trainer looks for in a model that brings its own sharding, so that it neither moves nor wraps it.
        self.is_distributed_loading_by_transformers = self._is_fsdp_managed_module = True
        return self

    @property
    def sharded(self) -> bool:
        """Whether `shard` was called."""
        return getattr(self, "_is_fsdp_managed_module", False)

    # -- the loss

    def forward(self, input_ids: torch.Tensor, **cached: torch.Tensor) -> dict[str, torch.Tensor]:
        """Scalars {"loss", "ce", "kl", ...}: `loss` to be differentiated, the others means over tokens, to be logged.

        Args:
            input_ids: [B, T] int64; no padding, so no attention mask.
            cached: teacher states [B, T-1, width] by `state_key`, where they are read from a cache; a teacher whose states are
                given is not run.
        """
        loss, columns = self._compute(input_ids, cached, everything=False)
        return {"loss": loss, **{name: values.detach().mean() for name, values in columns.items()}}

    def token_terms(self, input_ids: torch.Tensor, *, everything: bool = True, **cached: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every column at each predicted position, [B, T-1]; KL without its factor T^2. For validation: call it without gradients.

        Args:
            everything: also CE and KL whose weight is 0, and every teacher's own figures on the whole batch.
        """
        return self._compute(input_ids, cached, everything)[1]

    def _compute(self, input_ids: torch.Tensor, cached: dict[str, torch.Tensor], everything: bool) -> tuple[torch.Tensor, dict]:
        weights = {name: weight.at(self.progress) for name, weight in self.weights().items()}
        active = [name for name in self.terms if weights[name] > 0 or everything]
        w_kl = weights["kl"] * losses.kl_scale(self.section.kl_reduction, input_ids.shape[1])
        with_kl = bool(self.teachers) and (w_kl > 0 or everything)
        student, head, routers = self._student_states(input_ids, active)
        read = with_kl or any(self.terms[name].reads_teachers for name in active)
        teachers = self._teacher_states(input_ids, cached) if read else []
        objective = replace(self._objective(), w_ce=weights["ce"], w_kl=w_kl if with_kl else 0.0)
        fused = self._fused(input_ids, teachers if with_kl else [], objective)
        view = View(input_ids[:, 1:], student, teachers, fused, head, routers)

        columns: dict[str, torch.Tensor] = {}
        loss = view.last.new_zeros((), dtype=torch.promote_types(view.last.dtype, torch.float32))
        if weights["ce"] or w_kl or everything:
            terms = fused(view.last, head)
            loss = loss + terms.loss
            if weights["ce"] or everything:
                columns["ce"] = terms.ce
            if with_kl:
                columns["kl"] = terms.kl
        for name in active:
            outcome = self.terms[name](view)
            loss = loss + weights[name] * outcome.loss
            columns |= outcome.columns
        # DDP waits for a gradient of every parameter, also of those that only terms of weight 0 read.
        idle = [parameter for name in self.terms.keys() - set(active) for parameter in self.terms[name].parameters()]
        if not (weights["ce"] or w_kl):  # nor the head, nor the blocks above those that a term reads
            idle += [view.last, *(part for part in head if part is not None)]
        loss = loss + 0.0 * sum(part.sum() for part in idle)
        if with_kl:
            columns |= self._each_teacher(view, everything)
        return loss, columns

    def _student_states(self, input_ids: torch.Tensor, active: list[str]) -> tuple[dict[int, torch.Tensor], Head, tuple]:
        linear = self._halves[1]
        if linear is None:  # the whole model makes the logits, and the loss takes those
            return {self.depth: self.student(input_ids=input_ids, use_cache=False).logits[:, :-1]}, Head(None), ()
        wanted = set().union(*(self.terms[name].student_states() for name in active))
        routed = {"output_router_logits": True} if "balance" in active else {}
        output = self._halves[0](input_ids=input_ids, use_cache=False, output_hidden_states=bool(wanted - {self.depth}), **routed)
        states = {state: output.hidden_states[state][:, :-1] for state in wanted - {self.depth}}
        states[self.depth] = output.last_hidden_state[:, :-1]
        return states, Head(linear.weight, linear.bias), output.router_logits if routed else ()

    def _teacher_states(self, input_ids: torch.Tensor, cached: dict[str, torch.Tensor]) -> list[dict[int, torch.Tensor]]:
        found = []
        for number, teacher in enumerate(self.teachers):
            wanted = Teacher.wanted_states(self.section, teacher.entry, teacher.depth)
            given = teacher.body is None or state_key(number, teacher.depth) in cached
            found.append({state: cached[state_key(number, state)] for state in wanted} if given else teacher.states(input_ids, wanted))
        return found

    def _objective(self) -> losses.LogitObjective:
        section = self.section
        return losses.LogitObjective(temperature=section.temperature.at(self.progress), label_smoothing=section.label_smoothing,
                                     divergence=section.divergence, jsd_beta=section.jsd_beta or 0.5, top_k=section.approximate_top_k,
                                     top_p=section.approximate_top_p, combine=section.combine)

    def _fused(self, input_ids: torch.Tensor, teachers: list[dict[int, torch.Tensor]], objective: losses.LogitObjective) -> FusedLoss:
        if not teachers:
            return FusedLoss(input_ids[:, 1:], objective, compiled=self.compiled)
        states = [states[teacher.depth] for teacher, states in zip(self.teachers, teachers, strict=True)]
        heads, joint = self._teacher_heads(input_ids.device.type)
        if joint:  # rounded to the head's type first, as cached states are, so that both give the same loss bit for bit
            states = [theirs.to(joint.weight.dtype) for theirs in states]
            return FusedLoss(input_ids[:, 1:], objective, [losses.joint_states(states, self.shares)], [joint], compiled=self.compiled)
        return FusedLoss(input_ids[:, 1:], objective, states, heads, self.shares, self.compiled)

    def _teacher_heads(self, device: str) -> tuple[list[Head], Head | None]:
        """Every teacher's head in the type of the products, and the joint one where logits are averaged; made once."""
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.teachers[0].head.weight.dtype
        if self._heads is None or self._heads[0][0].weight.dtype != dtype:
            # Copies in torch's own memory: a head mapped from a file may lie where a matrix product rounds its last bit differently.
            heads = [Head(*(part.detach().to(dtype, copy=True) if part is not None else None for part in teacher.head))
                     for teacher in self.teachers]
            joint = None
            if len(heads) > 1 and self.section.combine == "logits":
                joint = losses.joint_head(heads, self.shares)
                slices = joint.weight.split([teacher.width for teacher in self.teachers], dim=1)
                heads = [Head(weight, head.bias) for weight, head in zip(slices, heads, strict=True)]  # no second copy
            self._heads = heads, joint
        return self._heads

    @torch.no_grad()
    def _each_teacher(self, view: View, everything: bool) -> dict[str, torch.Tensor]:
        """Each teacher's own CE and, where there are several, its own KL to the student.

        In training on every fourth token of the micro-batch's first sequence: a figure for the log is not worth another
        pass over the vocabulary for every token.
        """
        rows = (slice(None), slice(None)) if everything else (slice(0, 1), slice(0, None, 4))
        columns = {}
        heads, _ = self._teacher_heads(view.targets.device.type)
        for number, (teacher, head, states) in enumerate(zip(self.teachers, heads, view.teachers, strict=True), 1):
            last = states[teacher.depth][rows]
            alone = FusedLoss(view.targets[rows], losses.LogitObjective(), compiled=False)
            columns[f"teacher{number}_ce"] = alone(last, head).ce
            if len(self.teachers) > 1:
                objective = replace(view.fused.objective, w_kl=1.0)
                pair = replace(alone, objective=objective, teacher_states=[last], teacher_heads=[head])
                columns[f"teacher{number}_kl"] = pair(view.last[rows], view.lm_head).kl
        return columns

    # -- what it says of itself

    def weights(self) -> dict:
        """{term: Schedule of its weight}."""
        section = self.section
        w_ce, w_kl = section.weights
        terms = {name: getattr(section, name, None) for name in self.terms}
        return {"ce": w_ce, "kl": w_kl, **{name: term.weight if term else fixed(0.0) for name, term in terms.items()}}

    def columns(self) -> list[str]:
        """Names of what validation reports, the same on every process."""
        names = ["ce"]
        if self.teachers:
            names += ["kl", *(f"teacher{n}_ce" for n in range(1, len(self.teachers) + 1))]
            names += [f"teacher{n}_kl" for n in range(1, len(self.teachers) + 1)] if len(self.teachers) > 1 else []
        return names + [name for term in self.terms.values() for name in term.columns()]

    def scheduled(self) -> dict[str, float]:
        """Present values of what changes over training, for the log."""
        values = {f"w_{name}": weight for name, weight in self.weights().items()} | {"temperature": self.section.temperature}
        return {name: schedule.at(self.progress) for name, schedule in values.items() if not schedule.constant}

    def flops_per_token(self, seq_len: int) -> tuple[float, float]:
        """FLOPs per token of a micro-step: (of the student and the terms, forward and backward; of the teachers, forward).

        Matrix products and attention, as `models.training_flops_per_token` counts them, with every token predicted. A term
        whose schedule is at 0 for a while counts throughout. The teachers' own figures for the log, which are computed on a
        few tokens, do not.
        """
        w_ce, w_kl = (weight.largest > 0 for weight in self.section.weights)
        linear = self._halves[1]
        head = (linear if linear is not None else self.student.get_output_embeddings()).weight
        own = models.training_flops_per_token(self.student, seq_len)
        if not (w_ce or w_kl):  # nobody asks for the student's logits
            own -= 2.0 * head.numel() * (2 + head.requires_grad)
        own += sum(term.flops_per_token(seq_len, head) for term in self.terms.values())
        logits = [2.0 * teacher.head.weight.numel() for teacher in self.teachers]
        bodies = sum(teacher.flops_per_token(seq_len) for teacher in self.teachers) - sum(logits)
        read = w_kl or any(term.reads_teachers for term in self.terms.values())
        passes = (w_ce or w_kl) + sum(term.fused_passes for term in self.terms.values())
        return own, read * bodies + w_kl * passes * sum(logits)

    def describe(self, seq_len: int) -> str:
        """The loss in one line, with the effective lambda that recipes are compared by."""
        section = self.section
        w_ce, w_kl = section.weights
        smoothed = f" (label smoothing {section.label_smoothing:g})" if section.label_smoothing else ""
        parts = [f"{w_ce} CE{smoothed}"] if w_ce.largest else []
        if self.teachers and w_kl.largest:
            name = {"forward_kl": "KL(teacher || student)", "reverse_kl": "KL(student || teacher)",
                    "jsd": f"JSD(beta {section.jsd_beta or 0.5:g})"}[section.divergence]
            restricted = f" on the top {section.approximate_top_k} entries (an approximation)" if section.approximate_top_k else (
                f" on the top {section.approximate_top_p:g} of the mass (an approximation)" if section.approximate_top_p else "")
            parts.append(f"{w_kl} T^2 {name}{restricted}")
        parts += [f"{weight} {name}" for name in self.terms if (weight := self.weights()[name]).largest]
        line = "loss = " + " + ".join(parts)
        if line == "loss = 1 CE":
            line = "loss = CE"
        if self.teachers and w_kl.largest:
            weight = losses.effective_lambda(w_ce.start, w_kl.start, section.kl_reduction, seq_len)
            line += f", T = {section.temperature}, {section.kl_reduction}: effective lambda = {weight:g}"
            line += "" if w_ce.constant and w_kl.constant else " at the start"
        if len(self.teachers) > 1:
            line += f"; mean of {section.combine} of " + ", ".join(f"{share:.2g} {teacher.entry.path}"
                                                                     for share, teacher in zip(self.shares, self.teachers, strict=True))
        return line + ("; the loss takes whole logits, because the student's are no plain linear layer" if self._halves[1] is None else "")


def trainable_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """Named parameters that an optimizer step changes: what a resume checkpoint has to hold."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
