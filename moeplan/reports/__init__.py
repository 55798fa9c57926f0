"""Plans, traces and profiles for people: pages, pictures, terminal views and the wording of figures."""
