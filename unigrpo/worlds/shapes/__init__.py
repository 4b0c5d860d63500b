"""Coloured shapes on a 3x3 grid, 32x32 pixels: scale tiny's stand-in for natural pictures.

    scene -> what a picture contains        render -> its pixels             specification -> what a prompt asks for
    prompts, reasoning -> its words         thinking -> the explicit plan    detect, verify -> pixels back to verdicts
"""

from unigrpo.worlds.shapes.prompts import caption_text, sample_record, sample_scene, vocabulary
from unigrpo.worlds.shapes.render import render
from unigrpo.worlds.shapes.scene import CELLS, COLORS, IMAGE_SIZE, SHAPES, Object, Scene, random_scene
from unigrpo.worlds.shapes.thinking import parse_plan, plan_satisfies, plan_text, sft_thinking, wrong_plan

__all__ = ["CELLS", "COLORS", "IMAGE_SIZE", "SHAPES", "Object", "Scene", "caption_text", "parse_plan", "plan_satisfies",
           "plan_text", "random_scene", "render", "sample_record", "sample_scene", "sft_thinking", "vocabulary", "wrong_plan"]
