"""The patch of the UNet that Apply EasyRef attaches to a MODEL."""
