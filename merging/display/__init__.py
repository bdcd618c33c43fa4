"""How results, notices and progress are shown to people: in a terminal, in a notebook and in logs."""

__all__: list[str] = []
