"""The making of the shipped weights: a simulator of stroke MRI, training on simulated patients, and evaluation."""
