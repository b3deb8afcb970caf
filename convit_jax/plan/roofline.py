"""The roofline: the least time that a step can take on a device with given peaks.

A step takes at least as long as its matrix products at the peak of the matrix units, and at least
as long as its reads and writes at the peak of the memory (Williams et al. 2009,
doi:10.1145/1498765.1498785). What devices send one another may overlap with that or come on top, so
its time is apart. What the host does comes on top.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Peaks of a device.

    Attributes:
      flops: FLOPs of matrix products a second.
      bandwidth: bytes that the memory reads and writes a second.
      interconnect: bytes that the device sends to others a second; None if not known.
    """

    flops: float
    bandwidth: float
    interconnect: float | None = None


@dataclasses.dataclass(frozen=True)
class Bound:
    """The bound of a step.

    Attributes:
      flops_seconds: time of the matrix products at the peak.
      bytes_seconds: time of the reads and writes at the peak.
      images: number of images in a step, over all devices.
      devices: number of devices.
      sent_seconds: time of what a device sends to others, at the peak of the interconnect, which is
        no part of `seconds`; None if the peak is not known.
    """

    flops_seconds: float
    bytes_seconds: float
    images: int
    devices: int
    sent_seconds: float | None = None

    @property
    def seconds(self) -> float:
        """The least time of a step."""
        return max(self.flops_seconds, self.bytes_seconds)

    @property
    def limit(self) -> str:
        """What takes that time: "matrix products" or "memory"."""
        return "matrix products" if self.flops_seconds >= self.bytes_seconds else "memory"

    @property
    def images_per_second(self) -> float:
        """The most images a second, over all devices."""
        return self.images / self.seconds

    def hours(self, steps: int) -> float:
        """Returns the least hours of a number of steps."""
        return steps * self.seconds / 3600

    def device_hours(self, steps: int) -> float:
        """Returns the least hours of a number of steps, times the devices."""
        return self.devices * self.hours(steps)

    def mfu(self, needed_flops: float, peaks: Peaks) -> float:
        """Returns the largest MFU, see `convit_jax.model.flops`.

        Args:
          needed_flops: FLOPs that the model needs in a step on one device.
          peaks: peaks of the device.
        """
        return needed_flops / (peaks.flops * self.seconds)


def bound(
    flops: float,
    bytes_moved: float,
    peaks: Peaks,
    images: int,
    devices: int,
    bytes_sent: float = 0.0,
) -> Bound:
    """Returns the bound of a step.

    Args:
      flops: FLOPs of the matrix products of a step on one device.
      bytes_moved: bytes that a step reads and writes on one device.
      peaks: peaks of the device.
      images: number of images in a step, over all devices.
      devices: number of devices.
      bytes_sent: bytes that a device sends to others in a step.
    """
    return Bound(
        flops / peaks.flops,
        bytes_moved / peaks.bandwidth,
        images,
        devices,
        None if peaks.interconnect is None else bytes_sent / peaks.interconnect,
    )


@dataclasses.dataclass(frozen=True)
class Feeding:
    """What a host must do so that its devices do not wait for images.

    Attributes:
      images_per_second: images that a host must make.
      cores: cores that make them, at the rate measured on one.
    """

    images_per_second: float
    cores: int

    @classmethod
    def of(cls, images_per_second: float, hosts: int, rate: float) -> "Feeding":
        """Returns the share of each of several hosts.

        Args:
          images_per_second: images of all hosts together.
          hosts: number of hosts.
          rate: images a second that one core makes.
        """
        share = images_per_second / hosts
        return cls(share, math.ceil(share / rate))
