"""Ischemic stroke lesion segmentation in DWI, ADC and FLAIR by an ensemble of networks. `pipeline.segment` is the main path."""

__version__ = "0.1.0"
