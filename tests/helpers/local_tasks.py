"""A folder of small tasks for lm-eval, which need no network."""

import json
from pathlib import Path

CHOICE, GENERATE, PERPLEXITY = "local_choice", "local_generate", "local_perplexity"
GROUP = "local_group"
TOKENS = 12
DOCUMENTS = (
    {
        "question": "The bridge over the river was",
        "choices": [" old", " a cake of bread"],
        "answer": 0,
        "text": "The bridge over the river was old, and nobody knew who had built it.",
    },
    {
        "question": "Nobody knew who had built",
        "choices": [" tomorrow", " it"],
        "answer": 1,
        "text": "Bread is baked from flour and water.",
    },
    {
        "question": "Bread is baked from",
        "choices": [" rivers", " flour"],
        "answer": 1,
        "text": "A tale.",
    },
)


def write_tasks(folder: Path) -> Path:
    """Writes a multiple choice, a generation, a perplexity and a group of the first two."""
    folder.mkdir(parents=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "fewshot_split": "test",
    }
    tasks = {
        CHOICE: {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "metric_list": [metric("acc", "mean", True)],
        },
        GENERATE: {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": TOKENS},
            "metric_list": [metric("exact_match", "mean", True)],
        },
        PERPLEXITY: {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [
                metric("byte_perplexity", "weighted_perplexity", False),
                metric("bits_per_byte", "bits_per_byte", False),
            ],
        },
    }
    for name, task in tasks.items():
        write(folder / f"{name}.yaml", {"task": name, **source, **task})
    group = {
        "group": GROUP,
        "task": [CHOICE, GENERATE],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    write(folder / "group.yaml", group)
    return folder


def metric(name: str, aggregation: str, higher_is_better: bool) -> dict:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": higher_is_better}


def write(path: Path, config: dict) -> None:
    path.write_text(json.dumps(config))  # JSON is YAML too
