#include <cmath>

#include "team.h"
#define KD_ISA generic
#include "../kd_math.h"
#include "vec_generic.h"

#include "all.h"
