"""edgemoa: small boards on one network answer a prompt together."""

__version__ = "0.1.0"
