// NVIDIA's vector_types.h includes this name, and the wheels do not bring it.

#include "nb_emulator_keywords.h"
