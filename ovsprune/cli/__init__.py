"""The command line: one small file a command, no logic; nothing heavy is imported until it runs."""
