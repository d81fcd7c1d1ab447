"""TowerVision and TowerVideo: how they see a picture and the frames of a video."""
