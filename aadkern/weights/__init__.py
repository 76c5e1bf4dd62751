"""Files of a Wan transformer's weights: names in Wan's spelling and diffusers', single files read and written, shapes that tell a
configuration."""
