"""What epok costs: bench.py measures it, image.py that of the image; uninstall.py tries how an uninstallation ends."""
