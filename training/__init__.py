"""How the shipped weights were made: a simulator of stroke MRI, training on what it makes, and honest evaluation."""
