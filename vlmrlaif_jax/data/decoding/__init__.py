"""Reading of frames and their times from containers, pictures and animations."""
