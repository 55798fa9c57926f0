"""The measuring room: profiles of devices, links and routers, and the public measured tables."""
