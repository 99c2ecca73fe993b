# The serial of the volume at this place: the user's, or one that is made of the place.
index: volume:

if volume.serial or null != null then volume.serial else "volume-${toString index}"
