"""The README's Python sample, on a tiny model under the README's name."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_sample_prints_an_answer_of_the_chat(converted, tmp_path, monkeypatch, capsys):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "SmolLM2-135M-Instruct").symlink_to(converted)
    monkeypatch.chdir(tmp_path)
    sample = re.search(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)[1]
    names = {}
    exec(sample, names)
    assert capsys.readouterr().out.strip()
    asked = names["tokenizer"].decode(names["prompt"])
    assert "What is a prime number?" in asked and asked != "What is a prime number?"
