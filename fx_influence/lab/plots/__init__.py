"""The families of figures, see ``fx_influence.lab.plot``."""
