"""A slice of a NIfTI volume as a radiologist sees it, with square pixels.

Voxels are turned to RAS+ (`nibabel.as_closest_canonical`), so that axial slices count from the feet, coronal ones from
the back, sagittal ones from the left. Shown are: axial with the front up, coronal and sagittal with the head up; the
patient's right is at the image's left, and in sagittal slices the front is at the left.
"""

import gzip
import logging
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from PIL import Image

from medr1.data.images.display import (
    CT_WINDOWS,
    UNDEFINED,
    finite_values,
    given_window,
    robust_range,
    square_pixels,
    stretched,
    windowed,
)
from medr1.data.images.limits import MAX_BYTES, MAX_PIXELS, extra, reason
from medr1.data.images.reference import Reference
from medr1.errors import MedR1Error

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}
"""Of a canonical volume, the axis that a slice is cut across."""

_RGB, _RGBA = (np.dtype([(part, np.uint8) for part in parts]) for parts in ("RGB", "RGBA"))
"""Types of coloured voxels (NIfTI-1 codes 128 and 2304)."""


def read_nifti(reference: Reference) -> tuple[Image.Image, dict[str, Any]]:
    """One slice, the middle axial one by default, of the first volume where there are several; of a volume that is one
    slice thick, that slice.

    Scaled by the header's slope and intercept, and stretched as `display.robust_range` says unless the selector gives
    a window. Undefined voxels are black, complex ones show their magnitude. Only the slice is read.
    """
    reference.allow("NIfTI volume", "axis", "slice", "window")
    given = given_window(reference, numbered=False)
    with _volume(reference) as volume:
        from nibabel.affines import voxel_sizes

        shape = _shape(volume)
        native, flipped = _native_axes(reference, volume)
        name, axis = _axis(reference, shape, native)
        # The affine matrix also says which way the axes run; pixdim beside it may tell of other sides.
        voxel = voxel_sizes(volume.affine)
        sides = [float(voxel[one]) for one in native]
        pixdim = np.array(volume.header.get_zooms()[:3])
        agree = bool((np.isclose(voxel[: len(pixdim)], pixdim, rtol=0.01) | (pixdim == 0)).all())
        total = shape[native[axis]]
        place = reference.whole("slice", total // 2 + 1, 1, total) - 1
        index: list[Any] = [slice(None)] * 3 + [0] * (volume.ndim - 3)
        index[native[axis]] = total - 1 - place if flipped[axis] else place
        if volume.ndim == 2:
            plane = np.asarray(volume.dataobj)[..., np.newaxis][tuple(index)]
        else:
            plane = np.asarray(volume.dataobj[tuple(index)])
        num_volumes = math.prod(shape[3:])
        placed = bool(volume.header["qform_code"] or volume.header["sform_code"])
    across, up = (one for one in range(3) if one != axis)
    if native[across] > native[up]:
        plane = plane.T  # now (across, up) in the volume's own directions
    turned = plane[:: 1 if flipped[across] else -1, :: 1 if flipped[up] else -1].T
    decisions: dict[str, Any] = {"kind": "NIfTI", "slice": f"{name} {place + 1} of {total}"}
    if turned.dtype.kind == "c":
        turned, decisions["values"] = np.abs(turned), "magnitude of complex values"
    warnings = []
    if turned.dtype.names:
        if given:
            raise reference.wrong("window", "none: this volume has colours")
        shown, decisions["window"] = np.stack([turned[part] for part in "RGB"], axis=-1), "none: colours as they are"
    else:
        finite = finite_values(Reference(reference.path, {"axis": name, "slice": str(place + 1)}), turned)
        if finite.size < turned.size:
            warnings.append(UNDEFINED)
        if given:
            shown, decisions["window"] = windowed(turned, given[0], given[1], "LINEAR_EXACT"), given[2]
            if reference.selector["window"] in CT_WINDOWS:
                warnings.append("NIfTI does not say whether its values are Hounsfield units")
        else:
            low, high, decisions["window"] = robust_range(finite)
            shown = stretched(turned, low, high)
    if not placed:
        warnings.append("the header states no orientation: left and right may be exchanged")
    if not agree:
        warnings.append("its affine matrix and its pixdim tell of voxels of different sides: the matrix is taken")
    if num_volumes > 1:
        decisions["volume"] = f"1 of {num_volumes}"
    image = Image.fromarray(shown).convert("RGB")
    height, width = sides[up], sides[across]
    if all(math.isfinite(side) and side > 0 for side in (height, width)):
        image = square_pixels(reference, image, height, width)
        decisions["aspect"] = f"voxels {height:g} high, {width:g} wide: {shown.shape[1]} x {shown.shape[0]} became "
        decisions["aspect"] += f"{image.width} x {image.height}"
    return image, {**decisions, "warnings": warnings}


def num_slices(reference: Reference) -> int:
    """Slices along the selected axis, axial by default."""
    with _volume(reference) as volume:
        shape = _shape(volume)
        native, _ = _native_axes(reference, volume)
        return shape[native[_axis(reference, shape, native)[1]]]


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Without nibabel's lines about odd headers: its own way takes the handlers off, and Python then prints them."""
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


@contextmanager
def _volume(reference: Reference) -> Iterator[Any]:
    """The volume, at least three-dimensional, with its voxels still in the file.

    Raises:
        MedR1Error: anything about the header or, inside the block, the voxels is wrong.
    """
    nibabel: Any = extra("nibabel", reference)
    try:
        with ExitStack() as stack:
            stack.enter_context(_silent(nibabel.imageglobals.logger))
            file: Any = stack.enter_context(reference.path.open("rb"))
            is_packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if is_packed:
                file = stack.enter_context(gzip.open(file))
            head = file.read(348)
            file.seek(0)
            is_second = head[4:7] in (b"n+2", b"ni2")
            volume = (nibabel.Nifti2Image if is_second else nibabel.Nifti1Image).from_stream(file)
            header = volume.header
            if b"ni" in (head[344:346], head[4:6]):  # in a single file the magic word begins with n+
                raise ValueError("it is the header of a .hdr and .img pair: join them into one .nii file")
            if 3000 <= header["intent_code"] < 3100:
                raise ValueError("it is CIFTI, values on a surface, no picture")
            if (start := int(volume.dataobj.offset)) < (end := 544 if is_second else 352):
                raise ValueError(f"its voxels begin at byte {start}, inside the header of {end}: mend vox_offset")
            kind = volume.get_data_dtype()
            if not (kind.kind in "iufc" or kind in (_RGB, _RGBA)) or volume.ndim < 2 or min(volume.shape) < 1:
                sides = " x ".join(map(str, volume.shape)) or "no"
                raise ValueError(f"no picture: {sides} values of type {kind}")
            shape = _shape(volume)[:3]
            size = start + math.prod(shape) * kind.itemsize
            slice_size = math.prod(shape) / min(shape)
            if size > MAX_BYTES or slice_size > MAX_PIXELS:
                raise ValueError(f"a volume of {' x '.join(map(str, volume.shape))} is above the limits of medr1")
            if not is_packed and size > reference.path.stat().st_size:
                raise ValueError("it is cut off: its header tells of more voxels")
            yield volume
    except MedR1Error:
        raise
    except Exception as error:  # nibabel, gzip and zlib raise many kinds at bad bytes
        raise MedR1Error(f"{reference}: cannot be read as NIfTI ({reason(error)}); fetch it again") from error


def _shape(volume: Any) -> tuple[int, ...]:
    """Sides in voxels, three or more: a flat image is one layer thick."""
    return (*volume.shape, 1) if volume.ndim == 2 else volume.shape


def _axis(reference: Reference, shape: tuple[int, ...], native: list[int]) -> tuple[str, int]:
    """The axis that is cut across: the selector's, else the one that a single slice lies across, else axial."""
    thin = [name for name, axis in AXES.items() if shape[native[axis]] == 1]
    name = reference.selector.get("axis", thin[0] if len(thin) == 1 else "axial")
    if name not in AXES:
        raise reference.wrong("axis", ", ".join(AXES))
    return name, AXES[name]


def _native_axes(reference: Reference, volume: Any) -> tuple[list[int], list[bool]]:
    """For each canonical axis, the volume's own axis along it, and whether that runs the other way."""
    import nibabel

    orientation = nibabel.io_orientation(volume.affine)  # (own axis) -> canonical axis, 1 or -1
    if not np.isfinite(orientation).all():
        raise MedR1Error(f"{reference}: its header gives voxels no place in space; mend its affine matrix")
    native = [int(np.flatnonzero(orientation[:, 0] == axis)[0]) for axis in range(3)]
    return native, [bool(orientation[own, 1] < 0) for own in native]
