"""Test-time adaptation of routers on unlabelled images, on Lightning Fabric."""
