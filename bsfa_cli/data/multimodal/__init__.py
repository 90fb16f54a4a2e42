"""Users' own images and videos with questions, captions and answers: read, packed to a length, and scored.

    annotations = Annotations("val.json", Media(Path("images"), frames=32))
    first, *others = annotations.packed(processor, samples=8, length=32768)
    model(**first.inputs)

A benchmark's annotation file is told by its keys (`families`); its images are opened when they are packed, not before.
"""
