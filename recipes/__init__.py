"""What trained the models that ship with Kvern, from their data to their figures; none of it is part of the package."""
