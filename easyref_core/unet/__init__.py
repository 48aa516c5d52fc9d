"""The UNet side: reference attention, where it is, and how layers, steps and masks weigh it."""
