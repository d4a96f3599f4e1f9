"""The command line: one file a command. Heavy packages are imported inside the commands, so that help is quick."""
