"""Eigenvalue spectra of weight matrices, and power laws fitted to their tails."""

from ovsprune.spectrum.alphas import group_alphas
from ovsprune.spectrum.eigenvalues import eigenvalues
from ovsprune.spectrum.fits import FITS, PowerLaw, hill, least_ks, peak
from ovsprune.spectrum.matrices import Matrix, matrices
from ovsprune.spectrum.measure import Spectrum, spectra

__all__ = [
    "FITS",
    "Matrix",
    "PowerLaw",
    "Spectrum",
    "eigenvalues",
    "group_alphas",
    "hill",
    "least_ks",
    "matrices",
    "peak",
    "spectra",
]
