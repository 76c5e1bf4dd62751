"""Draws all pictures that code draws: ``python docs/images/draw_all.py``. tests/house/test_pictures.py holds them to the code."""

from __future__ import annotations

import ablation_aad1
import ablation_afd
import ablation_asd
import house
import plans
import pooling
import ring
import stages

for picture in (ablation_aad1, ablation_afd, ablation_asd, house, plans, pooling, ring, stages):
    picture.main()
