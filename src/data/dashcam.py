"""Rendered scenes from a dashcam: collisions that announce themselves by looming, and twins that end well.

A scene lasts five seconds at 10 frames a second, 96x64 in grey, from a car that drives at 8 to 16 m/s. Half of the
scenes lead to a collision: they break off a quarter of a second earlier, before it fills the picture. A frame's label
is 1 where a collision follows within 1.5 seconds. Every kind of collision has a twin that begins in the same way and
in which nothing happens:

| Kind | collision | twin |
|---|---|---|
| `lead` | the car in front brakes, 1.5 to 3 s before | so it does, but the camera's car brakes too, in time |
| `oncoming` | a car comes over from the other lane into ours, 1 to 2.5 s before | it stays in its lane and passes |
| `crossing` | a car or a pedestrian crosses, at a constant bearing | it passes in front of us or behind |

All scenes have parked cars, houses and posts that loom and pass, other traffic, a road with marks, changing light and
haze, a camera that trembles, and a sensor's noise. Nothing in these films is real.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Float, UInt8

from .scenes import Scene, SceneBuilder, generator

FRAMES, HEIGHT, WIDTH, RATE = 50, 64, 96, 10.0
HORIZON_SECONDS = 1.5  # an alarm is right for this long before a collision
EVENTS = ('lead', 'oncoming', 'crossing')
FOCAL, HORIZON, CAMERA = 80.0, 27.0, 1.3  # pixels, row, metres above the road
NEAREST, FARTHEST = 0.8, 90.0  # metres between which bodies are drawn
CONTACT = 1.0  # metres from the camera to a body that it hits
END = FRAMES / RATE + 0.25  # seconds from a scene's beginning to its collision

Times = Float[np.ndarray, 't']
Image = Float[np.ndarray, 'h w']


class Body(NamedTuple):
  """A body that stands on the road and faces the camera.

  kind: 'rear' or 'side' of a car, 'person', 'house' or 'post'. x, z: metres to the right and ahead, at every frame.
  """

  kind: str
  x: Times
  z: Times
  width: float
  height: float
  grey: float


class Dashcam(SceneBuilder):
  """320, 60 and 240 rendered scenes, half of which are before a collision; see data/dashcam.py."""

  VERSION = tfds.core.Version('1.0.1')
  KINDS = tuple(f'{event}_{end}' for event in EVENTS for end in ('collision', 'passes'))
  SHAPE = (FRAMES, HEIGHT, WIDTH)
  RATE = RATE
  COUNT = {'train': 320, 'validation': 60, 'test': 240}  # noqa: RUF012

  def scene(self, split: str, i: int) -> Scene:
    rng = generator(split, i)
    event, collides = EVENTS[i // 2 % len(EVENTS)], i % 2 == 0
    time = np.arange(FRAMES) / RATE
    speed = np.full(FRAMES, rng.uniform(8, 16))
    body, braking = _EVENTS[event](time, speed[0], collides, rng)
    speed = np.maximum(speed - braking, 0)
    gone = np.concatenate([[0], np.cumsum(speed[:-1])]) / RATE
    bodies = [body, *surroundings(time, gone, event, rng)]
    label = np.zeros(FRAMES, np.uint8)
    if collides:
      label[time >= END - HORIZON_SECONDS] = 1
    return Scene(film(bodies, gone, rng), label, f'{event}_{"collision" if collides else "passes"}')


def lead(time: Times, speed: float, collides: bool, rng: np.random.Generator) -> tuple[Body, Times]:
  """Returns the car in front, which brakes, and by how much we have slowed down at each time.

  In the twin we brake too, and a gap is left.
  """
  del speed
  before = rng.uniform(1.5, 3.0)  # seconds from its braking to the end of the gap
  gap = rng.uniform(8, min(30, 4 * before**2))
  brakes = 2 * (gap - CONTACT) / before**2  # metres a second squared
  begins = END - before if collides else rng.uniform(0.8, END - before)
  since = np.maximum(time - begins, 0)
  z = gap - brakes * since**2 / 2
  braking = np.zeros(len(time))
  if not collides:
    reacts = before * np.sqrt(rng.uniform(0.2, 0.6))  # seconds until this share of the gap is gone
    closing, left = brakes * reacts, gap - brakes * reacts**2 / 2
    rest = rng.uniform(0.3, 0.6) * left
    ours = closing**2 / (2 * (left - rest))
    after = np.clip(since - reacts, 0, closing / ours)
    z = np.where(since < reacts, z, left - closing * after + ours * after**2 / 2)
    braking = (brakes + ours) * after
  x = rng.uniform(-0.4, 0.4) + 0.15 * np.sin(time + rng.uniform(0, 6))
  return Body('rear', x, z, 1.8, 1.45, rng.uniform(30, 220)), braking


def oncoming(time: Times, speed: float, collides: bool, rng: np.random.Generator) -> tuple[Body, Times]:
  """Returns a car of the other lane, which comes over before a collision; we do not brake."""
  closing = speed + rng.uniform(8, 16)
  arrives = END if collides else rng.uniform(2.0, END + 0.5)
  z = CONTACT + closing * (arrives - time)
  lane, over = rng.uniform(-3.9, -3.1), rng.uniform(1.0, 2.5)
  share = np.clip((time - (arrives - over)) / (0.8 * over), 0, 1)
  aim = rng.uniform(-0.6, 0.6) if collides else lane + rng.uniform(-0.4, 0.7)
  x = lane + (aim - lane) * share**2 * (3 - 2 * share)
  return Body('rear', x, z, 1.8, 1.45, rng.uniform(30, 220)), np.zeros(len(time))


def crossing(time: Times, speed: float, collides: bool, rng: np.random.Generator) -> tuple[Body, Times]:
  """Returns somebody who crosses at constant speed, to where we are at the same time or not; we do not brake."""
  person = rng.random() < 0.5
  across = rng.uniform(1.5, 3.0) if person else rng.uniform(5, 10)
  across *= rng.choice([-1, 1])
  half = 0.3 if person else 2.1
  arrives = END if collides else rng.uniform(2.0, END + 0.5)
  aim = rng.uniform(-0.6, 0.6) if collides else rng.choice([-1, 1]) * (half + rng.uniform(2.0, 4.5))
  z = CONTACT + speed * (arrives - time)
  x = aim - across * (arrives - time)
  kind, height = ('person', 1.75) if person else ('side', 1.45)
  return Body(kind, x, z, 2 * half, height, rng.uniform(30, 220)), np.zeros(len(time))


_EVENTS: dict[str, Callable] = {'lead': lead, 'oncoming': oncoming, 'crossing': crossing}


def surroundings(time: Times, gone: Times, event: str, rng: np.random.Generator) -> list[Body]:
  """Returns parked cars, houses, posts and harmless traffic; `gone` is the way that we have driven, in metres."""
  bodies, still = [], np.ones(len(time))
  for side in (-1, 1):
    for place in np.arange(rng.uniform(5, 15), gone[-1] + FARTHEST, rng.uniform(14, 22)):
      width, x = rng.uniform(4, 9), side * rng.uniform(11, 15)
      bodies.append(Body('house', x * still, place - gone, width, rng.uniform(4, 9), rng.uniform(60, 200)))
    for place in np.arange(rng.uniform(5, 30), gone[-1] + FARTHEST, 30.0):
      bodies.append(Body('post', side * 6.5 * still, place - gone, 0.25, 5.0, 90.0))
  for place in rng.uniform(10, gone[-1] + 40, rng.integers(2, 6)):
    bodies.append(
      Body('rear', rng.uniform(4.6, 5.4) * still, place - gone, 1.8, rng.uniform(1.3, 2.2), rng.uniform(30, 220))
    )
  if event != 'oncoming' and rng.random() < 0.6:
    z = rng.uniform(30, 120) - gone - rng.uniform(8, 14) * time
    bodies.append(Body('rear', rng.uniform(-4, -3.2) * still, z, 1.8, rng.uniform(1.3, 2.5), rng.uniform(30, 220)))
  if event != 'lead' and rng.random() < 0.5:
    z = rng.uniform(45, 70) + rng.uniform(-1, 3) * time
    bodies.append(Body('rear', rng.uniform(-0.4, 0.4) * still, z, 1.8, 1.45, rng.uniform(30, 220)))
  return bodies


def film(bodies: list[Body], gone: Times, rng: np.random.Generator) -> UInt8[np.ndarray, 't h w']:
  """Renders what the camera sees, frame by frame."""
  light, haze, sky = rng.uniform(0.7, 1.15), rng.uniform(40, 120), rng.uniform(150, 235)
  grain, frames = rng.uniform(-1, 1, (64, 64)), []
  # No change over time may reveal how old a scene is, because every collision is at the end.
  clouds, phase = rng.uniform(0.1, 0.3), rng.uniform(0, 2 * np.pi)
  tremble = rng.normal(0, 0.35, (len(gone), 2))
  for t, way in enumerate(gone):
    image = road(way, sky, haze, grain, *tremble[t])
    for body in sorted(bodies, key=lambda b: -b.z[t]):
      if NEAREST < body.z[t] < FARTHEST:
        draw(image, body, t, sky, haze, *tremble[t])
    frames.append(image * light * (1 + 0.03 * np.sin(clouds * t + phase)) + rng.normal(0, 3, image.shape))
  return np.clip(frames, 0, 255).round().astype(np.uint8)


def road(way: float, sky: float, haze: float, grain: Image, pitch: float, yaw: float) -> Image:
  """Draws the sky, and the ground by the ray through every pixel."""
  v, u = np.mgrid[:HEIGHT, :WIDTH] + 0.5
  below = v - HORIZON - pitch
  image = np.broadcast_to(sky - 0.6 * below, below.shape).copy()  # brighter above
  z = FOCAL * CAMERA / np.maximum(below, 0.3)
  x = (u - WIDTH / 2 - yaw) * z / FOCAL
  along = z + way
  rough = grain[(along * 1.5).astype(int) % 64, np.floor(x * 2).astype(int) % 64]
  ground = np.where(np.abs(x) < 6, 85, 60 + 25 * (np.sin(x) > 0)) + 14 * rough * np.exp(-z / 12)
  thick = np.maximum(0.08, z / FOCAL / 2)  # no thinner than a pixel
  edge = np.abs(np.abs(x) - 5.7) < thick
  dash = (np.abs(x + 1.75) < thick) & (along % 9 < 3)
  ground = np.where(edge | dash, 200, ground)
  ground = sky + (ground - sky) * np.exp(-z / haze)
  return np.where(below > 0, ground, image)


def draw(image: Image, body: Body, t: int, sky: float, haze: float, pitch: float, yaw: float) -> None:
  """Draws a body as rectangles with edges between pixels: its shadow, its shape, and details that tell its distance."""
  scale = FOCAL / body.z[t]
  bottom = HORIZON + pitch + CAMERA * scale
  left = WIDTH / 2 + yaw + (body.x[t] - body.width / 2) * scale
  width, height = body.width * scale, body.height * scale
  fade = np.exp(-body.z[t] / haze)
  if left > 1.1 * WIDTH or left + 1.1 * width < 0:
    return

  def part(x0: float, x1: float, y0: float, y1: float, grey: float, cover: float = 1.0) -> None:
    """Draws a rectangle, in shares of the body from its left and its foot."""
    columns, across = _covered(left + x0 * width, left + x1 * width, WIDTH)
    rows, down = _covered(bottom - y1 * height, bottom - y0 * height, HEIGHT)
    target = image[down, across]
    target += cover * rows[:, None] * columns * (sky + (grey - sky) * fade - target)

  if body.kind in ('rear', 'side'):
    part(-0.05, 1.05, -0.12, 0.1, 20, 0.7)
    part(0, 1, 0.1, 0.6, body.grey)
    cabin = (0.1, 0.9) if body.kind == 'rear' else (0.2, 0.75)
    part(*cabin, 0.6, 1.0, 0.8 * body.grey)
    part(cabin[0] + 0.06, cabin[1] - 0.06, 0.62, 0.93, 35)
    wheels = ((0.05, 0.22), (0.78, 0.95)) if body.kind == 'rear' else ((0.12, 0.28), (0.72, 0.88))
    for ends in wheels:
      part(*ends, 0.0, 0.2, 15)
    if body.kind == 'rear':
      for ends in ((0.03, 0.15), (0.85, 0.97)):
        part(*ends, 0.4, 0.5, 245)
  elif body.kind == 'person':
    stride = 0.25 + 0.2 * np.sin(t * 1.8 + body.grey)
    part(0.2 - stride / 2, 0.5 - stride / 2, 0, 0.45, 0.5 * body.grey)
    part(0.5 + stride / 2, 0.8 + stride / 2, 0, 0.45, 0.5 * body.grey)
    part(0.1, 0.9, 0.45, 0.85, body.grey)
    part(0.3, 0.7, 0.87, 1.0, 150)
  else:
    part(0, 1, 0, 1, body.grey)
    if body.kind == 'house' and width > 6:  # else its windows are too small to be seen
      for row in (0.2, 0.6):
        for column in (0.1, 0.4, 0.7):
          part(column, column + 0.18, row, row + 0.22, 40)


def _covered(first: float, last: float, size: int) -> tuple[Float[np.ndarray, ' n'], slice]:
  """Returns how much of each pixel lies between two places, and which pixels these are."""
  covered = slice(max(0, int(np.floor(first))), max(0, min(size, int(np.ceil(last)))))
  share = np.ones(max(0, covered.stop - covered.start))
  if len(share):  # the ends' edges lie between pixels
    share[0] -= max(0, first - covered.start)
    share[-1] -= max(0, covered.stop - last)
  return share, covered
