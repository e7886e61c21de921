"""Policy families: how each is loaded, modelled and captured."""
