// Stands in for Apple's header: what metal-cpp needs of it.
#pragma once

typedef struct __IOSurface* IOSurfaceRef;
