"""A generator trained against a discriminator, and the usefulness of its images."""
