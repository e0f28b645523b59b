from medr1.cli.main import app, main

__all__ = ["app", "main"]
