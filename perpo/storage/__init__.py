"""What lies on disk: is it ours, and whole?"""
