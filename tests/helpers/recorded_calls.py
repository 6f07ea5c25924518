"""What a function of the package was called with, while it works as ever."""


def recorded_calls(monkeypatch, owner, name) -> list[tuple]:
    """A list that gets the positional arguments of each call of ``owner.name`` from now on.

    Of a method ``owner`` is the class, and the first argument is the object.
    """
    original = getattr(owner, name)
    calls = []

    def recorded(*arguments, **options):
        calls.append(arguments)
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, recorded)
    return calls
