"""The Hugging Face hub: downloading the published corpora, and the model card that every final model carries."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from babylm.config import DownloadSection, RunConfig, UserError

if TYPE_CHECKING:
    from babylm.run_folder import RunFolder


def download_corpus(section: DownloadSection, which: str, folder: Path) -> None:
    """Fetch a published corpus (its *.train files) into `folder`: with a progress bar, continuing what was cut off.

    Args:
        section: repository names.
        which: "strict-small" (10M words) or "strict" (100M words).
        folder: where the .train files go; files that are there and whole are not fetched again.

    Raises:
        UserError: no network, no such repository, access refused, or the repository holds no .train files.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # HTTPError: the base of all errors of its client

    repository = section.strict_small if which == "strict-small" else section.strict
    where = f"{repository} (revision {section.revision})"
    print(f"downloading {where} into {folder}", flush=True)
    try:
        # The commit is asked for first: without a network, snapshot_download would pass off whatever lies in the folder.
        commit = HfApi().dataset_info(repository, revision=section.revision).sha
        names = HfApi().list_repo_files(repository, repo_type="dataset", revision=commit)
        snapshot_download(repository, repo_type="dataset", revision=commit, local_dir=folder,
                          allow_patterns=["*.train", "*.train.txt"])
    except RepositoryNotFoundError as error:
        raise UserError(f"the hub has no dataset {where}, or it needs a login (hf auth login): check download.* in the config") from error
    except (HTTPError, OSError) as error:  # OSError: also what the client raises when it is offline and has no copy
        raise UserError(f"could not download {where}: no network, or the hub did not answer ({type(error).__name__}). What has "
                        "arrived is kept: run the same command again, or put the .train files into the input folder yourself") from error
    files = [folder / name for name in sorted(names) if name.endswith((".train", ".train.txt"))]
    for file in files:  # some repositories keep them in a sub-folder, or add .txt
        target = folder / file.name.removesuffix(".txt")
        if target != file:  # the first one stays: it tells the next download what is here
            shutil.copyfile(file, target)
    if not files:
        raise UserError(f"the hub dataset {where} holds no .train files: check download.* in the config")


def model_card(config: RunConfig, folder: "RunFolder", result: dict[str, Any], own_code: bool = False) -> str:
    """The README.md of a final model: what it is, what it has seen, how it scores, how to load it (`own_code`: with code inside)."""
    trust = ", trust_remote_code=True" if own_code else ""
    domains = "\n".join(f"| {name} | {value:.4f} |" for name, value in result["ce_by_domain"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [babylm]
---

# {config.name}

Trained by `{folder.stage}` (seed {config.seed}): {result["parameters"]:,} parameters, {result["words_seen"]:,} words seen
(repeats counted), weights of step {result["weights_from_step"]:,} of {result["steps"]:,}.

Validation cross-entropy {result["ce"]:.4f} nats per token, perplexity {result["perplexity"]:.2f}.

| domain | CE (nats per token) |
|---|---|
{domains}

## Word ledger

```json
{json.dumps(result["ledger"], indent=1)}
```

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/{config.name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("path/to/{config.name}"{trust})  # prepends the start token by itself
```

The exact configuration is in `run/config.yaml`, the versions, the commit and the command in `run/record.json`.
"""
