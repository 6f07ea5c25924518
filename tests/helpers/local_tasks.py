"""A folder of small tasks for lm-eval, which need no network."""

import json
from pathlib import Path

CHOICE, GENERATE, PERPLEXITY = "local_choice", "local_generate", "local_perplexity"
GROUP = "local_group"
TOKENS = 12
LONG = "The bridge over the river was old, and nobody knew who had built it."
DOCUMENTS = [
    {"question": question, "choices": choices, "answer": answer, "text": text}
    for question, choices, answer, text in (
        ("The bridge over the river was", [" old", " a cake of bread"], 0, LONG),
        ("Nobody knew who had built", [" tomorrow", " it"], 1, "Bread is baked from flour."),
        ("Bread is baked from", [" rivers", " flour"], 1, "A tale."),
    )
]
TASKS = {
    CHOICE: {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    GENERATE: {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": TOKENS},
        "metric_list": [{"metric": "exact_match"}],
    },
    PERPLEXITY: {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Writes a multiple choice, a generation, a perplexity and a group of the first two."""
    folder.mkdir(parents=True)
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    files = {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")}
    source = {"dataset_path": "json", "dataset_kwargs": files}
    source |= {"test_split": "test", "fewshot_split": "test"}
    configs = {name: {"task": name, **source, **task} for name, task in TASKS.items()}
    mean = {"metric": "acc", "aggregation": "mean"}
    configs["group"] = {"group": GROUP, "task": [CHOICE, GENERATE], "aggregate_metric_list": [mean]}
    for name, config in configs.items():
        (folder / f"{name}.yaml").write_text(json.dumps(config))  # JSON is YAML too
    return folder
