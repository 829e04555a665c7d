// Stands in for Apple's header: what metal-cpp needs of it.
#pragma once

#include <TargetConditionals.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef double CFTimeInterval;
typedef const void* CFTypeRef;
