"""Tables of the commands."""

from mlx_flashhead.common.tables import new_table, show

COLUMNS = 9


def test_no_figure_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    table = new_table(
        "A title. " * 20, [f"heading {i}" for i in range(COLUMNS)], "A caption. " * 20
    )
    table.add_row(*(f"{i}234.5678" for i in range(COLUMNS)))
    show("Some text. " * 20, table)
    text, _, screen = capsys.readouterr().out.partition("A title.")
    for i in range(COLUMNS):
        assert f"heading {i}" in screen and f"{i}234.5678" in screen
    assert max(map(len, text.splitlines())) <= 60
