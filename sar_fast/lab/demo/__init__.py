"""The demo: the shipped model on drawn pictures, with and without SAR."""
