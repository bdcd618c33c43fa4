"""The command ``merge``: click only; nothing heavy is imported until a command runs."""
