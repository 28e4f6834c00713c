"""Base models and encoders: by name, from files, from the hub; and the small one that ships."""
