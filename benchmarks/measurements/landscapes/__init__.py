"""Landscapes recorded from a real model: how they were measured, and problems that look losses up."""
