"""The attacking command, python -m attacks.run; a library module never imports it."""
