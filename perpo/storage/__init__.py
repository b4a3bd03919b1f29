"""Files that a run keeps, and whether what lies on disk belongs to it and is whole. Imports nothing of perpo.

atomic        a file that appears whole or not at all
journal       lines appended one by one, each with a checksum
checksums     the files of a folder, as they were written
fingerprints  short hashes of values, files and weights
identity      what a folder's contents were made from
lock          one process at a time
"""
