"""Spectral densities of weights, and power laws fitted to their tails."""

from ovsprune.spectrum.alphas import group_alphas
from ovsprune.spectrum.eigenvalues import eigenvalues
from ovsprune.spectrum.fits import FITS, PowerLaw, hill, least_ks, peak

__all__ = ["FITS", "PowerLaw", "eigenvalues", "group_alphas", "hill", "least_ks", "peak"]
