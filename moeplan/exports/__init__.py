"""Plans to and from the files of serving engines and training frameworks, one module per target, each a plugin."""
