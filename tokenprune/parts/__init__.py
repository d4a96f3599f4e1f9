"""The parts of a stage, one file a role. A part is a module with keyword-only arguments and one pure `forward`."""
