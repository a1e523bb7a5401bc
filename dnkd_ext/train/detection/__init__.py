"""Faster R-CNN with FPN on COCO: torchvision's detectors, learning from a teacher's proposals."""
