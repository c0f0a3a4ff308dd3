"""Command ``ovsprune launch``: run a framework's own script with slim towers."""
