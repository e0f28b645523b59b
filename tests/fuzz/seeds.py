"""Small valid inputs for each target, from which the search starts."""

import base64
import csv
import gzip
import io
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image
from targets import DATA_NAMES, IMAGE_NAMES, SELECTORS


def image() -> Iterator[bytes]:
    files = {"x.png": [], "x.tif": [], "x.jpg": [], "x.dcm": list(_dicom()), "x.nii": [_nifti()]}
    files["x.nii.gz"] = [gzip.compress(_nifti(), mtime=0)]
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    for picture in (grey, grey.convert("RGB"), grey.convert("I;16"), grey.convert("RGBA"), grey.convert("CMYK")):
        for name, kind in (("x.png", "PNG"), ("x.tif", "TIFF"), ("x.jpg", "JPEG"), ("x", "WEBP"), ("x", "BMP"),
                           ("x", "GIF"), ("x", "PPM"), ("x", "JPEG2000")):  # fmt: skip
            file = io.BytesIO()
            try:
                picture.save(file, kind)
            except (OSError, KeyError, ValueError):
                continue  # not every format holds every kind of pixel
            files.setdefault(name, []).append(file.getvalue())
    for name, contents in files.items():
        for content in contents:
            for selector in range(len(SELECTORS)):
                yield bytes([IMAGE_NAMES.index(name) + selector * len(IMAGE_NAMES)]) + content


def _dicom() -> Iterator[bytes]:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    for syntax, bits, frames in (
        (ExplicitVRLittleEndian, 16, 1),
        (ImplicitVRLittleEndian, 8, 3),
        (RLELossless, 16, 1),
    ):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, "1.2.3", "CT"
        dataset.Rows = dataset.Columns = 4
        dataset.BitsAllocated = dataset.BitsStored = bits
        dataset.HighBit, dataset.PixelRepresentation, dataset.SamplesPerPixel = bits - 1, 0, 1
        dataset.PhotometricInterpretation, dataset.NumberOfFrames = "MONOCHROME2", frames
        dataset.RescaleSlope, dataset.RescaleIntercept = 1, -1024
        dataset.WindowCenter, dataset.WindowWidth = [40, 50], [400, 350]
        values = np.arange(16 * frames, dtype=f"uint{bits}").reshape(frames, 4, 4)
        dataset.PixelData = values.tobytes()
        dataset.file_meta = FileMetaDataset()
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax == RLELossless else syntax
        if syntax == RLELossless:
            dataset.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
        file = io.BytesIO()
        dataset.save_as(file, enforce_file_format=True)
        yield file.getvalue()


def _nifti() -> bytes:
    import nibabel

    volume = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    return nibabel.Nifti1Image(volume, np.diag([1.0, 2.0, 3.0, 1.0])).to_bytes()


def dataset() -> Iterator[bytes]:
    omnimedvqa = {
        "dataset": "A",
        "question_id": "A_0",
        "question_type": "Disease Diagnosis",
        "question": "What is it?",
        "gt_answer": "Cyst",
        "image_path": "Images/A/0.png",
        "option_A": "Cyst",
        "option_B": "Tumour",
        "modality_type": "CT(Computed Tomography)",
    }
    split = {"image": "Images/A/0.png", "problem": "What is it? A) Cyst, B) Tumour", "solution": "<answer> A </answer>"}
    own = {"image": "0.png", "question": "What is it?", "options": ["Cyst", "Tumour"], "answer": "A"}
    table = "image,question,option_a,option_b,answer\n0.png,What is it?,Cyst,Tumour,A\n0.png;1.png,Where?,,,left\n"
    texts = {
        "QA_information/Open-access/A.json": json.dumps([omnimedvqa]),
        "CT_train.json": json.dumps([split]),
        "data.json": json.dumps([own]),
        "data.jsonl": json.dumps(own) + "\n" + json.dumps(own | {"id": "2"}) + "\n",
        "data.csv": table,
        "data.tsv": table.replace(",", "\t"),
    }
    public = (
        {"image_name": "a.jpg", "question": "Is it round?", "answer": "Yes", "phrase_type": "freeform", "qid": 1},
        {"img_name": "a/b.jpg", "question": "What?", "answer": "Liver", "q_lang": "en", "modality": "CT", "qid": 2},
        {"Figure_path": "a.jpg", "Question": "What?", "Choice A": "A:Cyst", "Choice B": "B:Tumour", "Answer": "A"},
        {"id": "MM-1", "question": "What?", "options": {"A": "Cyst", "B": "Tumour"}, "label": "A", "images": ["a.jpg"]},
        {"index": 3, "image": _png(), "question": "What?", "A": "Cyst", "B": "Tumour", "answer": "A"},
    )
    for name, text in texts.items():
        yield bytes([DATA_NAMES.index(name)]) + text.encode()
    for row in public:
        yield bytes([DATA_NAMES.index("data.jsonl")]) + json.dumps(row).encode()
        flat = {key: json.dumps(value) if isinstance(value, dict | list) else value for key, value in row.items()}
        for name, separator in (("data.csv", ","), ("data.tsv", "\t")):
            file = io.StringIO()
            writer = csv.DictWriter(file, list(flat), delimiter=separator)
            writer.writeheader()
            writer.writerow(flat)
            yield bytes([DATA_NAMES.index(name)]) + file.getvalue().encode()


def _png() -> str:
    """A small picture in base64."""
    file = io.BytesIO()
    Image.new("L", (2, 2)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def reply() -> Iterator[bytes]:
    options = ["Cyst", "Tumour of the lung", "Stage II", "Stage III"]
    for text in (
        "<think>It is round.</think><answer>B</answer>",
        "<answer>C) Stage II</answer>",
        "The answer is **D**.",
        "It is not A; \\boxed{B}",
        "I cannot tell from this image.",
        "<think>It never ends",
        "<answer>Cyst or tumour",
    ):
        yield "\n\0".join([text, *options]).encode()
        yield text.encode()


SEEDS = {"image": image, "dataset": dataset, "reply": reply}
