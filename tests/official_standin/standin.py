"""A small pipeline with the official one's command line and result files, for tests: it knows nothing of the code it checks.

Sentences are scored one at a time, in the plainest way. STANDIN_BUG=ignore_revision makes it load the final model always.
"""

import argparse
import csv
import json
import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def nats(model, tokenizer, text):
    """Log-probability of a text after its start token."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        table = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(table[place, token].item() for place, token in enumerate(ids[0, 1:].tolist()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_path_or_name")
    parser.add_argument("backend")
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--revision_name")
    args = parser.parse_args()
    revision = "main" if os.environ.get("STANDIN_BUG") == "ignore_revision" else args.revision_name
    model = AutoModelForCausalLM.from_pretrained(args.model_path_or_name, revision=revision, trust_remote_code=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_path_or_name, revision=revision, trust_remote_code=True)
    root = Path("results", Path(args.model_path_or_name).stem, args.revision_name or "main", "zero_shot", args.backend)
    for folder in args.data:
        if folder.name == "reading":
            score_reading(model, tokenizer, folder / "reading_data.csv", root / "reading")
        else:
            score_choices(model, tokenizer, folder, root / ("wug_past" if folder.name.startswith("wug") else "blimp") / folder.name)


def score_choices(model, tokenizer, folder, output):
    predictions, right = {}, {}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            texts = row["sentences"].split("\t") if "sentences" in row else [row["sentence_good"], row["sentence_bad"]]
            scores = torch.tensor([nats(model, tokenizer, text) for text in texts])
            chosen = int(scores.argmax())
            entry = predictions.setdefault(file.stem, {"predictions": []})["predictions"]
            entry.append({"id": f"{file.stem}_{len(entry)}", "pred": texts[chosen]})
            if "sentences" in row:
                entry[-1]["prob"] = scores.softmax(0)[0].item()
            right.setdefault(file.stem, []).append(chosen == 0)
    accuracy = {uid: 100 * sum(values) / len(values) for uid, values in right.items()}
    output.mkdir(parents=True, exist_ok=True)
    (output / "predictions.json").write_text(json.dumps(predictions))
    lines = ["TEMPERATURE: 1.00", "", "### UID ACCURACY", *(f"{uid}: {value:.2f}" for uid, value in accuracy.items()), "",
             "### AVERAGE ACCURACY", f"{sum(accuracy.values()) / len(accuracy):.2f}", ""]
    (output / "best_temperature_report.txt").write_text("\n".join(lines))


def score_reading(model, tokenizer, file, output):
    rows = list(csv.DictReader(file.open()))
    predictions = [{"id": index, "pred": -nats(model, tokenizer, f"{row['item']} {row['word']}"),
                    "prev_pred": -nats(model, tokenizer, f"{row['prev_item']} {row['prev_word']}") if row["prev_item"] else float("nan")}
                   for index, row in enumerate(rows)]
    output.mkdir(parents=True, exist_ok=True)
    (output / "predictions.json").write_text(json.dumps({"reading": {"predictions": predictions}}))
    mean = sum(row["pred"] for row in predictions) / len(predictions)
    (output / "report.txt").write_text(f"EYE TRACKING SCORE: {mean:.2f}\nSELF-PACED READING SCORE: {mean / 2:.2f}\n")


if __name__ == "__main__":
    main()
